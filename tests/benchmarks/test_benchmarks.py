"""Tests that the benchmarks run, and that the rivals compute the same gradients, so that they time the same work."""

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pretrain.families.gpt2 import GPT2Config
from tests.benchmarks import step, stores, watching
from tests.benchmarks.rivals import RANK_RIVALS, RIVALS, Problem, lacks
from tests.in_process import in_process
from tests.pretrain.helpers import make_corpus
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
NO_GRADIENTS = "three bare matmuls"


@pytest.mark.parametrize("name", [name for name in RIVALS if name != NO_GRADIENTS])
def test_rivals_compute_the_same_gradients(name):
    if lacks(name):
        pytest.skip(f"{name} needs {lacks(name)}")
    problem = Problem.draw(64, 32, 384, "cpu")
    for made, truth in zip(RIVALS[name](problem)(), problem.truth(), strict=True):
        assert (made.double() - truth).norm() < 5e-2 * truth.norm()  # rounding the logits to bf16 explains this much


def rank_errors(rank, world, name):
    problem = Problem.draw(64, 32, 384, "cpu")
    dhidden, dweight = problem.truth()
    mine = dhidden.chunk(world)[rank] if "distinct" in name else dhidden
    made = RANK_RIVALS[name](problem, rank, world)()
    truths = mine, dweight.chunk(world)[rank]
    return [float((its.double() - truth).norm() / truth.norm()) for its, truth in zip(made, truths, strict=True)]


@pytest.mark.parametrize("name", RANK_RIVALS)
def test_rivals_on_two_ranks_compute_the_same_gradients(name):
    for errors in run_ranks(2, rank_errors, name, timeout=120):
        assert max(errors) < 5e-2


def table(*arguments: str) -> list[list[str]]:
    """Runs a benchmark and returns the rows of the table that it prints."""
    command = [sys.executable, *(part for argument in arguments for part in argument.split())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    return rows_of(done)


def table_here(main: Callable[[], None], *arguments: str) -> list[list[str]]:
    """Runs the benchmark in this process, so that its ranks are forked from the other tests' server."""
    return rows_of(in_process(main, *(part for argument in arguments for part in shlex.split(argument))))


def rows_of(done: subprocess.CompletedProcess[str]) -> list[list[str]]:
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_head_benchmark_runs():
    rows = table("tests/benchmarks/head.py --vocab 512 --tokens 64 --width 32 --repeats 1 --only Rowshard")
    assert [row[0] for row in rows] == [NO_GRADIENTS, "Rowshard"]
    assert float(rows[0][2]) == 1.0 and float(rows[1][2]) > 0


def test_step_benchmark_runs_and_losses_agree():
    """All systems reach about the same loss. The fused loss is left out, because compiling it takes almost a minute."""
    names = [name for name in step.SYSTEMS if name != step.FUSED]
    sizes = "--vocab 512 --width 128 --layers 1 --sequences 1 --length 32 --repeats 1"
    rows = table_here(step.main, sizes, f"--only {shlex.join(names)}")
    losses = [float(row[-1]) for row in rows]
    assert [row[0] for row in rows] == names and max(losses) - min(losses) < 0.01 * losses[0]


def losses_of_steps(rank, world):
    model = GPT2Config(layers=2, width=64, heads=2, context=16)
    steps = [step.SYSTEMS[name](model, 302, 2, torch.float32) for name in (step.RIVAL, step.MEGATRON)]
    return [[one() for _ in range(3)] for one in steps]


def test_megatrons_model_takes_the_same_steps_as_fsdp2():
    """It has the same weights, and splits them otherwise: in fp32, the losses of three steps agree."""
    for ours, theirs in run_ranks(2, losses_of_steps, timeout=120):
        assert theirs == pytest.approx(ours, rel=1e-5) and theirs[2] < theirs[0]


def test_tokenising_benchmark_runs():
    """The benchmark stops unless all write the same tokens; one bare loop is half of the limit for two processes."""
    rows = table("tests/benchmarks/tokenising.py --megabytes 0.3 --rows 300 --repeats 1 --workers 2")
    assert len(rows) >= 5 and rows[0][2] == "0.50" and rows[2][0] == "Rowshard"


def test_reading_benchmark_runs(tmp_path):
    done = table(f"tests/benchmarks/reading.py --millions 0.5 --length 64 --repeats 1 --folder {tmp_path}")
    names = [f"Rowshard, {kind}" for kind in ("windows", "masked", "packed")]
    assert [row[0] for row in done[:4]] == ["bare slices", *names]
    assert all(float(row[2]) > 0 for row in done[:4])


def test_stores_benchmark_runs(tmp_path):
    small = "model.layers=1 model.width=32 model.heads=2 train.seq_len=16 train.global_batch=8"
    data = f"--data {make_corpus(tmp_path / 'tokens')} --steps 3 --delays 5"
    disk, store = table_here(stores.main, f"{data} --settings {small}")
    assert (disk[0], store[0]) == ("disk", "store, 5 ms per answer")
    assert disk[5] == store[5] == "yes"


@pytest.mark.parametrize("monitor", ["embedding", "lens"])
def test_monitor_benchmark_runs(tmp_path, monitor):
    small = "model.layers=1 model.width=32 model.heads=2 train.seq_len=16 train.global_batch=8"
    data = f"--data {make_corpus(tmp_path / 'tokens')} --steps 10"
    arguments = f"--monitor {monitor} {data} --settings {small}"
    rows = table_here(watching.main, arguments)
    assert [row[0] for row in rows] == ["25", "50", "100", "250", "500"] and all(row[1].endswith("%") for row in rows)
