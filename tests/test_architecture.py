"""Tests rules that import-linter cannot check. Its own contracts are in pyproject.toml; `make lint` checks them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_models_are_pure_maths():
    for path in (ROOT / "pretrain/models").glob("*.py"):
        assert not {name for name in imported(path) if name.startswith("torch.distributed")}


def test_vocab_imports_only_torch_and_the_standard_library():
    for path in (ROOT / "pretrain/vocab").rglob("*.py"):
        roots = {name.split(".")[0] for name in imported(path)}
        assert roots <= {"torch", "triton"} | set(sys.stdlib_module_names), path


def test_packages_only_export_names():
    for path in [*(ROOT / "pretrain").rglob("__init__.py"), ROOT / "launch/__init__.py"]:
        for node in ast.parse(path.read_text()).body:
            assert isinstance(node, ast.Import | ast.ImportFrom | ast.Expr | ast.Assign), path


def test_environment_is_read_only_in_start_and_mesh():
    processes = {"train.py", "publish.py", "coordinate_run.py"}
    readers = {"mesh.py", "rendezvous.py", *processes}
    for path in (ROOT / "pretrain").rglob("*.py"):
        assert path.name in readers or "os.environ" not in path.read_text(), path


@pytest.mark.parametrize("module", ["data_prep.token_file", "pretrain.families"])
def test_light_modules_load_no_heavy_packages(module):
    heavy = {"torch", "tiktoken", "datasets", "hydra", "omegaconf"}
    code = f"import sys, {module}; print(*{heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "", done.stdout + done.stderr
