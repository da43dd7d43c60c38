"""Tests the wheel in a fresh environment outside the checkout: its commands work, and its packages are imported."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = "The rows of the matrix are split over the ranks. "


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of commands of a new environment, with the wheel and the dependencies of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pretrain", "data_prep", "launch", "conf", "pyproject.toml", "setup.py", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", ROOT / name, source / name], check=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source], folder)
    (wheel,) = folder.glob("rowshard-*.whl")
    run([sys.executable, "-m", "venv", "--without-pip", folder / "env"], folder)
    python = folder / "env/bin/python"
    run([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], folder)
    (packages,) = (folder / "env/lib").glob("python*/site-packages")
    dependencies = "".join(f"{path}\n" for path in {sysconfig.get_path("purelib"), *site_packages()})
    (packages / "dependencies.pth").write_text(dependencies)
    return folder / "env/bin"


def site_packages() -> list[str]:
    """The folder of this environment's installed packages, without the checkout."""
    return [entry for entry in sys.path if entry.endswith("site-packages")]


def run(command: list[object], folder: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_tokenises_trains_and_samples(installed: Path, tmp_path: Path):
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": TEXT * n}) + "\n" for n in range(1, 40)))
    run([
        installed / "rowshard-tokenize", "corpus=files", "corpus.paths=corpus.jsonl", "tokenizer.vocab_size=300",
        "out=tokens",
    ], tmp_path)  # fmt: skip
    said = run([
        installed / "rowshard-train", "nproc=1", "data.path=tokens", "run.dir=runs/a", "model=nano", "model.layers=1",
        "model.width=32", "model.heads=2", "train.steps=2", "train.seq_len=16", "train.global_batch=2",
        "train.micro_batch=1", "log.tensorboard=false",
    ], tmp_path)  # fmt: skip
    assert said.splitlines()[-1].startswith("sample: rowshard-generate run=runs/a")
    assert (tmp_path / "runs/a/checkpoints/step-00000002").is_dir()
    run([installed / "rowshard-generate", "run=runs/a", "prompt=The", "tokens=2"], tmp_path)


@pytest.mark.parametrize("command", ["tokenize", "train", "slurm", "plan", "generate", "evaluate", "lens", "hf"])
def test_help(installed: Path, tmp_path: Path, command: str):
    assert "=" in run([installed / f"rowshard-{command}", "--help"], tmp_path)


def test_clusters_are_found_in_the_wheel(installed: Path, tmp_path: Path):
    done = subprocess.run([installed / "rowshard-plan"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: +cluster=NAME is missing; there are a100x8, cpu,")


def test_imports_come_from_the_wheel_and_are_typed(installed: Path, tmp_path: Path):
    code = "import pretrain, data_prep, launch; print(*(m.__path__[0] for m in (pretrain, data_prep, launch)))"
    for package in run([installed / "python", "-c", code], tmp_path).split():
        assert Path(package).is_relative_to(installed.parent), package
        assert (Path(package) / "py.typed").is_file()
