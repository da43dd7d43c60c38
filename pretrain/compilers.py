"""Checks this machine's compilers, which Triton and torch.compile call when a kernel is first used.

No other module may depend on the device and on the settings of engine and data together.
"""

import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path


def check_compilers(device_type: str, compiles: bool, masked: bool, environment: Mapping[str, str]) -> None:
    """Raises ValueError if this machine cannot build the kernels of a run on this device.

    compiles: engine.compile. masked: data.documents is masked, which FlexAttention compiles on a GPU. environment: of
    the ranks.
    """
    off = {"engine.compile=true": "engine.compile=false"} if compiles else {}
    if device_type == "cuda":
        if masked:
            off["data.documents=masked"] = "data.documents=causal"
        if find_spec("triton") is not None:  # the vocabulary's kernels need a compiler as well: no setting avoids that
            path = environment.get("PATH")
            found = shutil.which("gcc", path=path) or shutil.which("clang", path=path) or "gcc"
            _build("kernels for a GPU", environment.get("CC", found), "CC", "c", "gcc", "", environment)
        elif off:
            asked, instead = " and ".join(off), " and ".join(off.values())
            raise ValueError(f"{asked} must have Triton on a GPU: pip install triton, or set {instead}")
    elif compiles:
        way_out = ", or set engine.compile=false"
        _build("engine.compile=true", environment.get("CXX", "g++"), "CXX", "c++", "g++", way_out, environment)


def _build(
    what: str, compiler: str, variable: str, language: str, package: str, way_out: str, environment: Mapping[str, str]
) -> None:
    """Builds a Python extension as Triton and Inductor do. Raises ValueError if that fails."""
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    include = sysconfig.get_path("include", scheme)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.write_text("#include <Python.h>\n")
        flags = ["-x", language, "-shared", "-fPIC", f"-I{include}", str(source), "-o", f"{source}.so"]
        flags += ["-fopenmp"] if language == "c++" else []
        try:
            done = subprocess.run([compiler, *flags], env=environment, capture_output=True, text=True, errors="replace")
        except OSError as error:
            raise ValueError(
                f"{what} must have a compiler, and {variable}={compiler} cannot be run ({error.strerror}): install"
                f" {package} and python3-dev, or set {variable}=/path/of/compiler{way_out}"
            ) from error
    if done.returncode:
        lines = done.stderr.splitlines()
        why = next((line for line in lines if "error" in line), lines[0] if lines else f"exit {done.returncode}")
        missing = f"Python.h is missing from {include}" if "Python.h" in why else why.strip()
        raise ValueError(
            f"{what} must have a compiler that builds Python extensions, and {variable}={compiler} does not"
            f" ({missing}): install {package} and python3-dev, or set {variable}=/path/of/compiler{way_out}"
        )
