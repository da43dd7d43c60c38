"""The phases of tests/gpu.py, as a rehearsal on this machine's CPU, and the page that is written from their files."""

import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.gpu_phases import correct, demo, head, report, step, trace
from tests.gpu_phases.running import Runner
from tests.ranks import context

ROOT = Path(__file__).resolve().parents[1]
MODULES = {"correct": correct, "head": head, "step": step, "demo": demo, "trace": trace}


def runner(out: Path, seconds: float = 300) -> Runner:
    return Runner(out, "small", "python tests/gpu.py --size small", time.monotonic() + seconds, context)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("results")


@pytest.mark.parametrize("phase", MODULES)
def test_phase_measures_all_its_parts(phase, results):
    parts = MODULES[phase].parts(True, results)
    assert runner(results).run(phase, parts) == []
    written = json.loads((results / f"{phase}.json").read_text())["parts"]
    assert list(written) == list(parts)
    for result in written.values():
        assert result["card"] and result["torch"] and result["triton"] and result["command"]
        assert all(math.isfinite(number) for number in numbers(result["figures"]))


def numbers(figures: object) -> list[float]:
    if isinstance(figures, dict):
        return [number for value in figures.values() for number in numbers(value)]
    if isinstance(figures, list):
        return [number for value in figures for number in numbers(value)]
    return [figures] if isinstance(figures, int | float) else []


def test_report_writes_the_page(results, tmp_path):
    """Runs after the phases. What was measured is on the page, the rest still says that it was not."""
    page = tmp_path / "benchmarks.md"
    page.write_text(report.PAGE.read_text())
    report.main([str(results), "--page", str(page)])
    text = page.read_text()
    before, section, after = re.split(f"{report.BEGIN}|{report.END}", text)
    assert [before, after] == re.split(f"{report.BEGIN}|{report.END}", report.PAGE.read_text())[::2]
    for size in head.SMALL:
        line = next(line for line in section.splitlines() if line.startswith(f"| {head.name_of(size)} |"))
        assert "%" in line and report.NOT_MEASURED not in line
    for size in head.FULL:
        assert f"| {head.name_of(size)} | {report.NOT_MEASURED} |" in section
    for name in step.FIRST:
        (line,) = [line for line in section.splitlines() if line.startswith(f"| llama_1b V=512 | {name} |")]
        assert report.NOT_MEASURED not in line.replace("| not measured | ", "", 1)  # a CPU has no MFU
    assert "4 of 4 losses equal" in section and "CPU, " in section and section.count("`python tests/gpu.py") > 3
    report.main([str(results), "--page", str(page)])
    assert page.read_text() == text
    with pytest.raises(SystemExit):
        report.main([str(results)])


def test_page_without_measurements_says_so(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n")
    report.main([str(tmp_path), "--page", str(page)])
    text = page.read_text()
    assert "nothing has been measured yet" in text and "old" not in text
    assert text.startswith("above\n") and text.endswith("\nbelow\n")


def fails() -> dict:
    raise RuntimeError("no such kernel")


def dies() -> dict:
    os._exit(3)


def works() -> dict:
    return {"answer": 42}


def test_failed_part_is_named_and_the_next_one_runs(tmp_path, capfd):
    parts = {"one": fails, "two": dies, "three": works}
    assert runner(tmp_path).run("any", parts) == ["any: one", "any: two"]
    written = json.loads((tmp_path / "any.json").read_text())["parts"]
    assert written["one"]["error"] == "RuntimeError: no such kernel" and "died" in written["two"]["error"]
    assert written["three"]["figures"] == {"answer": 42}
    assert "any: one: FAILED: RuntimeError: no such kernel" in capfd.readouterr().out
    assert runner(tmp_path, seconds=1).run("any", {"three": works}) == ["any: three"]
    assert [name for _, name in report.read(tmp_path)] == []  # a part that failed again is not measured


def hangs() -> dict:
    time.sleep(600)
    return {}


def test_part_is_stopped_when_the_time_ends(tmp_path):
    assert runner(tmp_path, seconds=6).run("any", {"one": hangs}) == ["any: one"]
    assert "stopped after" in json.loads((tmp_path / "any.json").read_text())["parts"]["one"]["error"]


def test_command_measures_in_fresh_processes(tmp_path):
    command = [sys.executable, "tests/gpu.py", "head", "--size", "small", "--only", "parts of", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads((tmp_path / "head.json").read_text())["parts"].values()
    assert result["figures"]["ms"]["dW += Fᵀ·X in fp32, 64 tokens"] > 0
    assert result["command"] == f"python tests/gpu.py {' '.join(command[2:5])} --only 'parts of' --out {tmp_path}"
