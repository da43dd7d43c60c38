"""launch/plan.py: planned against counted bytes, planned against measured memory, and the command."""

import re
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from launch.fit import fitting, larger, refusal
from launch.hardware import GIB, HARDWARE
from launch.plan import main
from launch.planner import plan
from launch.step import total
from pretrain import precision
from pretrain.vocab.kernels.torch import TorchKernels
from tests.benchmarks.plan import CASES, configured, planned_and_measured, step_of
from tests.in_process import in_process
from tests.launch.simulate import simulate

ROOT = Path(__file__).parents[2]
GPU = TorchKernels(slab_bytes=2**25, memory_mib=896)  # chunks about as a GPU's, in plain torch


def told(step, lookup):
    """Sums calls and bytes per (axis, kind). An axis of all ranks counts as the world."""
    calls, given = Counter(), Counter()
    for one in [*step.of_matrix(lookup), *step.of_body(), *step.of_optimizer()]:
        axis = "world" if one.ranks == step.world else one.axis
        calls[axis, one.kind] += one.calls
        given[axis, one.kind] += one.given
    return calls, given


SMALL = ["model=nano", "model.layers=2", "train.micro_batch=2", "train.seq_len=128"]
LLAMA = ["model.layers=3", "model.width=80", "model.heads=5", "model.kv_heads=1", "model.inner=150", "vocab.tie=untied"]
DEEPSPEED = ["engine=deepspeed", "model.width=320", "model.heads=5"]  # whose numbers do not divide by 24


@pytest.mark.parametrize(
    "world,parallel,settings",
    [
        (2, 1, []),
        (8, 8, ["vocab.tie=untied", "vocab.label_smoothing=0.1"]),
        (4, 2, ["vocab.untie_at=500"]),
        (24, 3, ["engine.hsdp=true"]),
        (24, 8, ["engine.reshard_after_forward=false", "engine.activation_checkpointing=block"]),
        (256, 256, ["model.layers=1"]),
        (1024, 16, ["model.layers=1", "engine.hsdp=true"]),
        (24, 8, [*DEEPSPEED, "engine.zero_stage=0"]),
        (24, 8, [*DEEPSPEED, "engine.zero_stage=1"]),
        (24, 8, [*DEEPSPEED, "engine.zero_stage=1", "train.precision=fp32"]),
        (24, 8, [*DEEPSPEED, "engine.zero_stage=2"]),
        (24, 8, [*DEEPSPEED, "engine.zero_stage=3"]),
        (24, 8, ["optim=muon", "model=family/llama", *LLAMA]),
        (24, 3, ["optim=muon", "engine.hsdp=true", "optim.newton_schulz=fp32"]),
        *((24, 8, ["optim=muon", *DEEPSPEED, f"engine.zero_stage={stage}"]) for stage in range(4)),
    ],
)
def test_a_step_gives_to_collectives_what_the_plan_says(world, parallel, settings):
    config = configured(*SMALL, f"train.global_batch={2 * 2 * world}", *settings)
    seen = simulate(config, 5000, parallel, world, GPU)
    step = step_of(config, 5000, parallel, world, GPU)
    assert told(step, seen.lookup) == (seen.calls, seen.given)


def test_lens_holds_the_states_of_its_rows():
    plain, looked = (
        step_of(configured(*SMALL, *settings), 5000, 2, 4, GPU) for settings in ([], ["monitor.lens_every=100"])
    )
    for name, items in plain.phases().items():
        assert total(looked.phases()[name]) == total(items)
    look = {item.name: item.bytes for item in looked.phases()["a look"]}
    config, rows = looked.config, 1 + len(looked.shapes.blocks)  # the input, the blocks but the last, the output
    states = rows * config.seq_len * config.model.width * looked.work.itemsize
    assert look["lens"] == states + max(states, 64 * 2**20) and look["gradients"] == look["activations"] == 0


def test_a_watched_matrix_has_a_second_gradient():
    """It is the lookup's, if one matrix has both uses."""
    plain, watched = (
        step_of(configured(*SMALL, *settings), 5000, 2, 4, GPU) for settings in ([], ["monitor.embedding_every=100"])
    )
    gradient = plain.shard.rows * plain.work.width * 4
    for name, items in plain.phases().items():
        assert total(watched.phases()[name]) == total(items) + gradient
    untied = ["vocab.tie=untied", "monitor.embedding_every=100"]
    one, other = (step_of(configured(*SMALL, *settings), 5000, 2, 4, GPU) for settings in (untied[:1], untied))
    assert one.phases() == other.phases()


@pytest.mark.parametrize("name", list(CASES)[:3])
def test_a_rank_holds_what_the_plan_says(name):
    """The plan is within 10 %. So far it was always 13 to 33 MiB below, the memory of gloo and malloc."""
    case = CASES[name]
    if name == "gpt2":
        case = case._replace(settings=f"{case.settings} model.layers=4")  # all blocks are alike
    planned, measured = planned_and_measured(case)
    for held in measured:
        assert planned == pytest.approx(held, rel=0.1)


@pytest.mark.parametrize(
    "settings",
    [
        ["model=gpt2", "train.micro_batch=8", "engine.activation_checkpointing=selective", "vocab.head_memory_mib=128"],
        ["model=gpt2", "train.micro_batch=1", "engine.hsdp=true", "vocab.tie=untied"],
    ],
    ids=["selective", "hsdp"],
)
def test_the_tensors_of_a_large_step_are_those_of_the_plan(settings, monkeypatch):
    """Uses bf16 on every processor: in fp32 a plan for a GPU's kernels is up to 12 % above."""
    monkeypatch.setattr(precision, "_computes_bf16", lambda device_type: True)
    config = configured(*settings, "model.layers=2", "train.global_batch=256")
    step = step_of(config, 50_257, 8, 16, GPU)
    told = max(map(total, step.phases().values()))
    assert told == pytest.approx(simulate(config, 50_257, 8, 16, GPU, bf16=True).held, rel=0.05)


def test_the_command_prints_the_plan_and_draws_it(tmp_path):
    picture = tmp_path / "plan.png"
    done = in_process(main, "+cluster=a100x8", "model=gpt2", "vocab.size=50257", f"plot={picture}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("1 node × 8 ranks on a100-80gb")
    assert lines[1].startswith("model: 124.4M parameters, 38.6M of them in 1 matrix of 50,257 rows (tied; untied: 163")
    assert lines[2] == "vocab.parallel=auto: 8 ranks per copy of the matrix"
    assert lines[-1].startswith("fits: ") and "GiB stay unused; no larger train.micro_batch" in lines[-1], lines
    for name in ("weights", "moments", "gradients", "gathered", "activations", "head", "lookup", "all"):
        assert any(line.startswith(name) for line in lines)
    assert [line.split()[0] for line in lines if line.endswith("<")] == ["8"]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["model=gpt2"], "+cluster=NAME is missing; there are"),
        (["+cluster=a100x8", "model=gpt2"], "vocab.size=null must be given, or data.path"),
        (
            ["+cluster=a100x8", "vocab.size=9", "vocab.parallel=3"],
            "vocab.parallel=3 must divide the number of ranks, 8",
        ),
    ],
)
def test_a_wrong_setting_is_one_line(arguments, message):
    done = in_process(main, *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("cluster,model", [("a100-80gb", "gpt2_xl"), ("h100", "gpt2"), ("h200", "gpt2_medium")])
def test_auto_is_about_as_fast_as_anything_on_that_gpu(cluster, model):
    """auto uses round numbers for any GPU."""
    config = configured(f"model={model}", "train.micro_batch=8", "train.global_batch=2048")
    planned = plan(config, 128_256, 64, 8, HARDWARE[cluster])
    assert planned.seconds <= 1.05 * min(sum(size.seconds) for size in planned.sizes)
    assert planned.chosen.ranks == 8 and planned.peak_bytes < HARDWARE[cluster].memory


def test_traffic_between_nodes():
    """A ring of 64 ranks leaves each of 8 nodes once; a vocab group of 8 stays in its node."""
    config = configured("model=gpt2", "train.global_batch=2048")
    sizes = {size.ranks: size for size in plan(config, 128_256, 64, 8, HARDWARE["h100"]).sizes}
    for size in sizes.values():
        sent = sum(one.sent for one in size.links)
        assert sum(size.near.values()) + sum(size.far.values()) == pytest.approx(sent)
        assert size.near["world"] == pytest.approx(7 * size.far["world"])
    assert sizes[8].far["vocab"] == 0 and sizes[16].far["vocab"] > 0
    assert sizes[8].near["dp"] == 0  # one rank of each node


LLAMA = ["+cluster=h100x64", "model=llama_8b", "vocab.size=128256", "train.global_batch=512", "train.micro_batch=4"]


def test_what_does_not_fit_is_refused_and_the_proposal_fits():
    done = in_process(main, *LLAMA)
    assert done.returncode == 1
    line = next(line for line in done.stdout.splitlines() if line.startswith("does not fit: a rank would hold "))
    assert "GiB, cluster.gpu=h100 has room for 76.0; this fits: " in line
    settings, told = line.split("this fits: ")[1].split(" (", 1)
    done = in_process(main, *LLAMA, *shlex.split(settings))
    assert done.returncode == 0 and "does not fit" not in done.stdout
    chosen = next(line for line in done.stdout.splitlines() if line.endswith("<")).split()
    assert f"{int(chosen[-2].replace(',', '')) / 1024:.1f} GiB, {chosen[-3]} tokens/s per rank)" == told


ROOM = {
    "a smaller micro-batch": ([], 60, {"train.micro_batch"}),
    "blocks computed again": (["train.micro_batch=1"], 30, {"engine.activation_checkpointing"}),
    "two changes": ([], 20, {"train.micro_batch", "engine.activation_checkpointing"}),
    "a higher stage": (
        ["engine=deepspeed", "train.micro_batch=1", "engine.activation_checkpointing=block"],
        40,
        {"engine.zero_stage"},
    ),
    "the body over all ranks": (
        ["engine.hsdp=true", "train.micro_batch=1", "engine.activation_checkpointing=block"],
        15,
        {"engine.hsdp"},
    ),
    "the optimizer on the host": (
        ["train.micro_batch=1", "engine.activation_checkpointing=block"],
        7,
        {"engine.offload", "vocab.parallel"},
    ),
    "a copy over more ranks": (
        ["train.micro_batch=1", "engine.activation_checkpointing=block", "vocab.parallel=1"],
        14,
        {"vocab.parallel"},
    ),
}


@pytest.mark.parametrize("settings,room,keys", ROOM.values(), ids=ROOM.keys())
def test_the_fewest_changes_that_fit_are_proposed(settings, room, keys):
    config = configured("model=llama_8b", "train.global_batch=512", "train.micro_batch=4", *settings)
    planned = partial(plan, rows=128_256, world=64, node=8, hardware=HARDWARE["h100"])
    assert planned(config).peak_bytes > room * GIB
    fit = fitting(config, 64, planned, room * GIB)
    assert {setting.split("=")[0] for setting in fit.settings} == keys and fit.bytes <= room * GIB, fit


def test_plan_that_cannot_fit_says_so():
    config = configured("model=llama_8b", "train.global_batch=8", "train.micro_batch=1", "train.seq_len=8192")
    planned = partial(plan, rows=2**24, world=1, node=1, hardware=HARDWARE["h100"])
    told = refusal(config, 1, planned, "h100", HARDWARE["h100"])
    assert "no other train.micro_batch, engine or vocab.parallel fits: give more ranks" in told


def test_an_empty_gpu_is_offered_a_larger_micro_batch_of_the_same_batch():
    config = configured("model=gpt2_xl", "train.global_batch=96", "train.micro_batch=2")
    planned = partial(plan, rows=50_257, world=8, node=8, hardware=HARDWARE["a100-80gb"])
    told = larger(config, 8, planned, 76 * GIB)
    micro = int(re.search(r"train.micro_batch=(\d+) ", told)[1])
    assert micro in (3, 4, 6, 12) and re.search(r"per rank\): \d+\.\d% more, and \d+% less traffic$", told), told
    full = replace(config, train=replace(config.train, micro_batch=12))
    assert larger(full, 8, planned, 2 * planned(full).peak_bytes - 1) == ""
    assert "no larger train.micro_batch" in larger(full, 8, planned, 76 * GIB)


def test_a_process_prints_the_same_plan_or_exits_with_2():
    line, small = [sys.executable, "launch/plan.py"], ["+cluster=cpu", "model=nano", "vocab.size=257"]
    done = subprocess.run([*line, *small], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, in_process(main, *small).stdout, "")
    done = subprocess.run([*line, *small, "vocab.parallel=3"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: vocab.parallel=3 must divide")
    assert done.stderr.count("\n") == 1


def test_impossible_schedule_is_refused():
    done = in_process(main, "+cluster=cpu", "model=nano", "vocab.size=257", "optim.warmup_steps=60", "train.steps=50")
    assert done.returncode == 2 and "optim.warmup_steps=60 must be below train.steps=50" in done.stderr


def test_the_plan_of_muon_has_its_share_of_the_step():
    """Newton-Schulz: 5 steps of 4·a²·b + 2·a³ FLOPs for each matrix a ≤ b, on 8 ranks, at half of the peak."""
    command = ["+cluster=h100x8", "model=llama_1b", "vocab.size=128256"]
    done = in_process(main, *command, "optim=muon")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("step of the body's optimizer: ")]
    share, whole = (float(re.search(form, line)[1]) for form in (r"([\d.]+)% of the step", r"Newton-Schulz ([\d.]+)"))
    block = 2 * [(2048, 2048)] + 2 * [(512, 2048)] + 3 * [(2048, 8192)]
    flops = 16 * sum(5 * (4 * a * a * b + 2 * a**3) for a, b in block)
    assert whole == pytest.approx(1e3 * flops / 8 / (HARDWARE["h100"].flops_bf16 / 2), rel=0.03)
    assert 0 < share <= 6
    moments = {line.split("body / ranks · ")[1][:4] for line in done.stdout.splitlines() if line.startswith("moments")}
    assert moments == {"4.00"}  # AdamW's is 8
    assert "body's optimizer" not in in_process(main, *command).stdout
