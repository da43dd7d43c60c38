"""Traces of real trainings, and what the command reads in them."""

import gzip
import json
from collections import Counter
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import pytest
import torch

from pretrain.commands import profile as command
from pretrain.config.job import JobConfig
from pretrain.hooks import Hook, Run, registry
from pretrain.profile import SUFFIX, read_trace, trace_folder, traces
from pretrain.timeline import PARTS
from tests.in_process import in_process
from tests.pretrain.helpers import TIMES
from tests.pretrain.tiny import saved_tensors, tiny_config, train_rank, write_tokens
from tests.ranks import run_ranks

STEPS = 4
CASES = {"fsdp2": ("fsdp2", 1), "fsdp2 on two ranks": ("fsdp2", 2), "deepspeed on two ranks": ("deepspeed", 2)}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("profile") / "tokens")


@pytest.fixture(scope="module", params=CASES)
def runs(request, data, tmp_path_factory) -> tuple[Path, Path, int]:
    """A run without a trace, and the same in two starts. The second start begins within the steps of its trace."""
    engine, world = CASES[request.param]
    folder = tmp_path_factory.mktemp("runs")
    plain, traced = folder / "plain", folder / "traced"
    settings = {"train__steps": STEPS, "engine__name": engine, "optim__warmup_steps": 2}
    run_ranks(world, train_rank, tiny_config(data, plain, **settings))
    run_ranks(world, train_rank, tiny_config(data, traced, train__stop_after=2, **settings))
    profile = {"steps": [2, STEPS], "ranks": list(range(world))}
    run_ranks(world, train_rank, tiny_config(data, traced, profile=profile, **settings))
    return plain, traced, world


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_trace_changes_no_bit(runs):
    plain, traced, _ = runs
    for one, other in zip(lines(plain), lines(traced), strict=True):
        assert {key: one[key] for key in one.keys() - TIMES} == {key: other[key] for key in other.keys() - TIMES}
    weights = saved_tensors(traced)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in saved_tensors(plain).items())


def test_the_parts_make_up_the_step(runs):
    for line in (line for run in runs[:2] for line in lines(run)):
        parts = {part: line[f"step_s/{part}"] for part in PARTS}
        assert all(value > 0 for value in parts.values())
        assert sum(parts.values()) <= line["step_s"] and 0 < line["communication_s"] <= sum(parts.values())


def test_a_trace_has_the_steps_of_its_start_and_their_parts(runs):
    _, traced, world = runs
    names = [f"steps-3-{STEPS}.rank-{rank}{SUFFIX}" for rank in range(world)]
    assert sorted(path.name for path in trace_folder(traced).iterdir()) == names
    micro_batches = 12 // (3 * world)
    for path in traces(traced):
        found = read_trace(path)
        calls = {row.part: row.calls for row in found.parts}
        assert found.steps == [3, STEPS] and not found.on_gpu
        assert calls["data"] == 1 and calls["head"] == calls["backward"] == micro_batches
        assert calls.keys() == set(PARTS)
        assert sum(row.milliseconds for row in found.parts) <= found.milliseconds
        of_parts = Counter[str]()
        for row in found.operations:
            of_parts[row.part] += row.milliseconds
        assert {row.part: row.milliseconds for row in found.parts} == pytest.approx(dict(of_parts), rel=1e-3)
        used = {(row.part, row.operation) for row in found.operations}
        assert ("optimizer", "aten::_fused_adamw_") in used and ("head", "aten::mm") in used


def test_the_command_prints_parts_and_ten_operations(runs):
    _, traced, world = runs
    done = in_process(command.main, f"run={traced}", f"rank={world - 1}")
    assert done.returncode == 0, done.stderr
    path, _, title, *rest = done.stdout.splitlines()
    assert path.endswith(f"steps-3-4.rank-{world - 1}{SUFFIX}") and title.startswith("steps 3 to 4: ")
    assert [line.split()[0] for line in rest[2 : 2 + len(PARTS)]] == list(PARTS)
    assert len(rest) == 1 + 1 + len(PARTS) + 1 + 1 + 10
    three = in_process(command.main, f"run={traced}", f"rank={world - 1}", "top=3")
    assert len(three.stdout.splitlines()) == len(done.stdout.splitlines()) - 7
    assert in_process(command.main, f"run={traced}").stdout.splitlines()[0].endswith(f".rank-0{SUFFIX}")
    missing = in_process(command.main, f"run={traced}", "rank=7")
    assert missing.returncode == 2 and f"rank=7 has no trace in run={traced}: there are steps-" in missing.stderr


class Fails(Hook):
    def before_update(self, trainer) -> None:
        if trainer.state.step == 2:
            raise FloatingPointError("at step 3")


def train_failing(rank: int, world: int, config: JobConfig) -> None:
    def build(config: JobConfig, run: Run) -> Fails:
        return Fails()

    registry.BUILDERS = (*registry.BUILDERS, build)
    with pytest.raises(FloatingPointError, match="at step 3"):
        train_rank(rank, world, config)


def test_a_failed_run_leaves_a_trace_of_the_steps_before(data, tmp_path):
    config = tiny_config(data, tmp_path, train__steps=STEPS, profile={"steps": [1, STEPS]})
    run_ranks(1, train_failing, config)
    (path,) = traces(tmp_path)
    assert path.name == f"steps-1-2.rank-0{SUFFIX}" and set(read_trace(path).steps) >= {1, 2}


def errors_of_training(rank: int, world: int, config: JobConfig) -> str:
    with redirect_stderr(StringIO()) as error:
        train_rank(rank, world, config)
    return error.getvalue()


def test_a_trace_that_cannot_be_written_ends_nothing(data, tmp_path):
    trace_folder(tmp_path).write_text("a file")
    config = tiny_config(data, tmp_path, train__steps=2, profile={"steps": [1, 1]})
    (error,) = run_ranks(1, errors_of_training, config)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert error.startswith("warning: no trace of steps 1 to 1: [Errno 17] File exists")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": [3]}, r"profile\.steps=\[3\] must be two steps"),
        ({"steps": [0, 2]}, r"profile\.steps=\[0,2\] must begin at step 1 or later"),
        (
            {"steps": [3, 2]},
            r"profile\.steps=\[3,2\] must begin at step 1 or later, and end at its first step or later",
        ),
        ({"steps": [1, 51]}, r"profile\.steps=\[1,51\] must be at most 50 steps"),
        ({"steps": [19, 21]}, r"profile\.steps=\[19,21\] must not go beyond step 20, the last of this start"),
        ({"steps": [1, 2], "ranks": []}, r"profile\.ranks=\[\] must be at least one rank"),
        ({"steps": [1, 2], "ranks": [-1]}, r"profile\.ranks=\[-1\] must be at least one rank"),
        ({"steps": "3"}, r"profile\.steps"),
    ],
)
def test_wrong_steps_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(tmp_path, tmp_path, profile=changes)


def test_a_rank_that_does_not_exist_is_refused(tmp_path):
    config = tiny_config(tmp_path, tmp_path, profile={"steps": [1, 2], "ranks": [0, 2]})
    config.profile.check_world(3)
    with pytest.raises(ValueError, match=r"profile\.ranks=\[0,2\] must be below 2, the number of ranks"):
        config.profile.check_world(2)


def test_a_run_without_a_trace_is_one_line(tmp_path):
    done = in_process(command.main, f"run={tmp_path}")
    assert done.returncode == 2 and f"run={tmp_path} has no trace: train some steps" in done.stderr
    damaged = trace_folder(tmp_path) / f"steps-1-2.rank-0{SUFFIX}"
    damaged.parent.mkdir()
    for content in (b"no gzip", gzip.compress(b"{"), gzip.compress(b'{"traceEvents": 3}' * 99)[:-9]):
        damaged.write_bytes(content)
        done = in_process(command.main, f"run={tmp_path}")
        assert done.returncode == 2 and done.stderr.startswith(f"error: {damaged} is damaged: ")


def event(category: str, name: str, start: float, length: float, tid: int = 1, **args: object) -> dict:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length, "tid": tid, "args": args}


def test_a_kernel_belongs_to_the_part_that_launched_it(tmp_path):
    """A trace as a GPU leaves it, of two steps: backward launches in a thread of its own, kernels run later than they
    are launched, and NCCL's beside others.
    """
    events = []
    for step, start in ((5, 0.0), (6, 10_000.0)):
        events += [
            event("user_annotation", f"ProfilerStep#{step}", start, 10_000),
            event("user_annotation", "forward", start, 4_000),
            event("user_annotation", "backward", start + 4_000, 5_000),
            event("user_annotation", "another label", start, 9_000),
            event("cuda_runtime", "cudaLaunchKernel", start + 3_900, 5, correlation=step),
            event(
                "cuda_runtime", "cudaLaunchKernel", start + 4_100, 5, tid=2, correlation=step + 10
            ),  # autograd's thread
            event("cuda_runtime", "cudaLaunchKernel", start + 4_200, 5, tid=2, correlation=step + 20),
            event("kernel", "gemm", start + 4_500, 2_000, tid=7, correlation=step),
            event("kernel", "gemm", start + 6_500, 1_000, tid=7, correlation=step + 10),
            event("kernel", "ncclDevKernel_AllGather", start + 7_000, 1_500, tid=8, correlation=step + 20),
        ]
    path = tmp_path / f"a{SUFFIX}"
    path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    found = read_trace(path)
    assert found.on_gpu and found.steps == [5, 6] and found.milliseconds == 10.0
    assert [(row.part, row.milliseconds, row.share) for row in found.parts] == [
        ("forward", 4, 0.4),
        ("backward", 5, 0.5),
    ]
    assert [(row.part, row.operation, row.milliseconds, row.calls) for row in found.operations] == [
        ("forward", "gemm", 2.0, 1),
        ("backward", "ncclDevKernel_AllGather", 1.5, 1),
        ("backward", "gemm", 1.0, 1),
    ]
    assert found.exposed == 1.0  # from the second gemm's end to the collective's
    assert "communication exposed: 1.00 ms/step, 10.0%" in command.page(found, 10)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_leaves_a_trace_and_a_snapshot(data, tmp_path):
    from pretrain.mesh import ranks
    from pretrain.stops import StopRequests
    from pretrain.train import train

    config = tiny_config(data, tmp_path, train__steps=3, profile={"steps": [2, 3]})
    with StopRequests() as requests, ranks() as device:
        train(config, device, requests)
    found = read_trace(traces(tmp_path)[0])
    assert found.on_gpu and found.steps == [2, 3] and found.operations
    assert (trace_folder(tmp_path) / "steps-2-3.rank-0.memory.pickle").stat().st_size > 0
