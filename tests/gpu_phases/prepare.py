"""Brings the packages that the phases need and that a machine with torch alone lacks. Imports no torch."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / ".gpu_site"
HYDRA = ("hydra-core==1.3.*", "omegaconf==2.3.*", "antlr4-python3-runtime==4.9.*")
PACKAGES = (*HYDRA, "cut-cross-entropy", "liger-kernel")


def prepare() -> None:
    """Installs the packages without their dependencies, so that torch stays the machine's own. Prints how to use them.

    All are pure Python, so another machine may have another version of Python.
    """
    shutil.rmtree(FOLDER, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--target", str(FOLDER), *PACKAGES], check=True)
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    if compiled := [path.name for path in files if path.suffix == ".so"]:
        print(f"warning: only for Python {sys.version_info.major}.{sys.version_info.minor}: {', '.join(compiled)}")
    size = sum(path.stat().st_size for path in files) / 2**20
    print(f"{FOLDER.name}: {size:.1f} MiB: {', '.join(sorted(PACKAGES))}")
    print(f"Carry {FOLDER.name} with the tree, for git ignores it. There: python tests/gpu.py correct head")


def use() -> None:
    """Makes this process, and those that it starts, find the packages of `prepare` where they are not installed."""
    if importlib.util.find_spec("hydra") is None and FOLDER.is_dir():
        sys.path.append(str(FOLDER))
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(FOLDER)]))
