"""A missing compiler is reported in one line before any work."""

import os
import sysconfig

import pytest

from pretrain import compilers
from pretrain.compilers import check_compilers
from pretrain.exits import Exit
from tests.launch.test_start import local, start, tokens  # noqa: F401


@pytest.fixture(params=[("cuda", "CC", "gcc"), ("cpu", "CXX", "g++")], ids=["gpu", "cpu"])
def machine(request, monkeypatch):
    """Device, compiler variable and package, on a machine with Triton where CC and CXX are unset."""
    monkeypatch.setattr(compilers, "find_spec", lambda _: True)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    return request.param


def test_machine_with_compiler_and_headers_passes(machine):
    check_compilers(machine[0], compiles=True, masked=True, environment=os.environ)


def test_missing_compiler_names_package(machine, monkeypatch, tmp_path):
    device, _, package = machine
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=rf"cannot be run .*install {package.replace('+', '.')} and python3-dev"):
        check_compilers(device, compiles=True, masked=False, environment=os.environ)


def test_invalid_compiler_variable_is_named(machine, monkeypatch):
    device, variable, _ = machine
    monkeypatch.setenv(variable, "/gone/away")
    with pytest.raises(ValueError, match=f"{variable}=/gone/away cannot be run"):
        check_compilers(device, compiles=True, masked=False, environment=os.environ)


def test_missing_python_headers_are_named(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    with pytest.raises(ValueError, match=f"Python.h is missing from {tmp_path}"):
        check_compilers(machine[0], compiles=True, masked=False, environment=os.environ)


def test_missing_triton_names_settings(monkeypatch):
    monkeypatch.setattr(compilers, "find_spec", lambda _: None)
    check_compilers("cuda", compiles=False, masked=False, environment=os.environ)
    with pytest.raises(ValueError, match=r"^data\.documents=masked must have Triton .* set data\.documents=causal$"):
        check_compilers("cuda", compiles=False, masked=True, environment=os.environ)


def test_cpu_run_without_compile_needs_no_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    check_compilers("cpu", compiles=False, masked=True, environment=os.environ)


def test_start_without_compiler_prints_one_line(tokens, tmp_path):  # noqa: F811
    run, empty = tmp_path / "run", tmp_path / "empty"
    empty.mkdir()
    environment = {"PATH": str(empty), "CXX": "g++", "CUDA_VISIBLE_DEVICES": ""}
    done = start("launch/local.py", *local(tokens, run), "nproc=1", "engine.compile=true", **environment)
    assert done.returncode == Exit.REFUSED == 2
    assert len(done.stderr.splitlines()) == 1 and "engine.compile=true must have a compiler" in done.stderr
    assert "g++ and python3-dev" in done.stderr and "engine.compile=false" in done.stderr
    assert not (run / "config.yaml").exists()
