"""The running average of the weights is that of the dense weights, on every engine, and survives a resume."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from launch.step import StepCost
from pretrain.checkpoint import checkpoints, read_manifest
from pretrain.checkpoint.rows import CheckpointRows
from pretrain.commands import hf
from pretrain.compose import freeze
from pretrain.config.ema import EmaConfig
from pretrain.config.generation import GenerateConfig
from pretrain.config.job import JobConfig
from pretrain.data import open_data
from pretrain.generation import generate
from pretrain.hooks import ema
from tests.in_process import in_process
from tests.launch.test_plan import GPU, SMALL, configured, step_of
from tests.pretrain.engine.test_engines import ENGINES
from tests.pretrain.helpers import make_corpus
from tests.pretrain.tiny import saved_tensors, tiny_config, train_rank
from tests.ranks import run_ranks

STEPS, DECAY = 6, 0.8
SETTINGS = {
    "train__steps": STEPS,
    "checkpoint__every": 1,
    "ema__decay": DECAY,
    "eval__every": 2,
    "model__width": 21,  # not divisible by any number of ranks
    "vocab__size": None,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("ema") / "data", val=160)


def settings_of(data: Path, run: Path, **changes: object) -> JobConfig:
    return tiny_config(data, run, **SETTINGS | changes)


def weights_of(folder: Path, prefix: str = "") -> dict[str, Tensor]:
    """The whole weights in a checkpoint, or its running average."""
    checkpoint = CheckpointRows(folder, prefix)
    names = [name for name in checkpoint.shapes if not name.startswith(("optim.", "ema."))]
    return {name: checkpoint.rows(name, 0, checkpoint.shapes[name][0]) for name in names}


def truth_of(run: Path, every: int = 1) -> dict[str, Tensor]:
    """Σ d^(n-i)·w_i / Σ d^(n-i) in float64 over the saved weights, with a split matrix as two from the start."""
    factor, mass, total = DECAY**every, 0.0, {}
    for folder in checkpoints(run):
        if read_manifest(folder)["step"] % every:
            continue
        weights = weights_of(folder)
        before = {"head.weight": total["embedding.weight"]} | total if total else {}
        total = {name: weight.double() + factor * before.get(name, 0.0) for name, weight in weights.items()}
        mass = factor * mass + 1
    return {name: tensor / mass for name, tensor in total.items()}


def assert_average(run: Path, every: int = 1) -> None:
    truth, found = truth_of(run, every), weights_of(checkpoints(run)[-1], "ema.")
    last = weights_of(checkpoints(run)[-1])
    assert found.keys() == truth.keys() == last.keys()
    for name, tensor in truth.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-6, atol=2e-7 * float(tensor.abs().max()), err_msg=name)
        assert not torch.allclose(found[name], last[name], rtol=1e-4, atol=1e-5), f"{name} did not move"


def train_all(rank: int, world: int, configs: list[JobConfig]) -> None:
    for config in configs:
        train_rank(rank, world, config)


SPLIT, MUON, OFFLOAD = {"vocab__untie_at": 3}, {"optim__name": "muon"}, {"engine__offload": "cpu"}
CASES: dict[int, list[tuple[str, dict[str, object], int]]] = {  # per world: engine, settings, steps between updates
    1: [("fsdp2", SPLIT, 1), ("zero1", {}, 2)],
    2: [(engine, MUON | SPLIT if engine in ("hsdp", "zero1") else MUON, 1) for engine in ENGINES],
    3: [("fsdp2", MUON | SPLIT, 1), ("zero3", OFFLOAD, 2)],
    4: [("fsdp2", SPLIT, 1), ("zero2", OFFLOAD, 2)],
}


@pytest.mark.parametrize("world", CASES)
def test_average_is_the_float64_recursion(data, tmp_path, world):
    """Trains with each engine and optimizer, with and without a split of the matrix, and with fewer updates."""
    runs, batch = {}, {"train__micro_batch": 2 if world == 3 else 3}
    for engine, changes, every in CASES[world]:
        config = settings_of(data, tmp_path / engine, engine=ENGINES[engine], ema__every=every, **batch, **changes)
        runs[config.run_dir] = (config, every)
    run_ranks(world, train_all, [config for config, _ in runs.values()], timeout=120)
    for run, (config, every) in runs.items():
        assert_average(run, every)
        momentum = "optim.momentum_buffer.blocks.0.mlp.up.weight" in read_manifest(checkpoints(run)[-1])["tensors"]
        assert momentum == (config.optim.name == "muon")


def swaps(rank: int, world: int, config: JobConfig) -> list[bool]:
    """After each evaluation: the state has the bits from before it; inside: the model has the average's loss."""
    seen: list[bool] = []
    swapped = ema.EmaHook.swapped

    def watched(self):
        before = bits_of(self)
        average = {name: t for name, t in before.items() if name.startswith("ema.")}
        context = swapped(self)
        context.__enter__()
        inside = bits_of(self)
        seen.append(all(torch.equal(inside[name.removeprefix("ema.")], t) for name, t in average.items()))
        context.__exit__(None, None, None)
        after = bits_of(self)
        seen.append(before.keys() == after.keys() and all(torch.equal(after[name], t) for name, t in before.items()))
        return swapped(self)

    ema.EmaHook.swapped = watched
    train_rank(rank, world, config)
    ema.EmaHook.swapped = swapped
    return seen


def bits_of(hook: ema.EmaHook) -> dict[str, Tensor]:
    parts = hook.parts
    state = {**parts.engine.state(), **hook.state_dict()}
    state |= {name: rows.detach() for name, rows in parts.model.vocab.named_rows().items()}
    tensors = {name: t for name, t in state.items() if isinstance(t, Tensor)}
    return {name: (t.to_local() if isinstance(t, DTensor) else t).clone() for name, t in tensors.items()}


@pytest.mark.parametrize("engine,precision", [("fsdp2", "auto"), ("zero1", "auto"), ("zero3", "fp32")])
def test_evaluation_of_the_average_is_that_of_its_weights(data, tmp_path, engine, precision):
    """A run that begins with the average as its weights, and learns nothing, has the same validation loss.

    A run without evaluations has the same training losses: each swap is undone, also in the copies of the engine.
    """
    kept = {"reshard_after_forward": False} if engine == "fsdp2" else {}  # an evaluation leaves weights gathered
    settings = {"engine": ENGINES[engine] | kept, "train__precision": precision}
    config = settings_of(data, tmp_path / "run", **settings)
    assert run_ranks(2, swaps, config) == [[True] * 6] * 2
    plain = settings_of(data, tmp_path / "plain", **settings | {"eval__every": 0, "ema__decay": None})
    run_ranks(2, train_rank, plain)
    lines, others = (lines_of(run) for run in (config.run_dir, plain.run_dir))
    assert [line["loss"] for line in lines] == [line["loss"] for line in others]
    assert "val_loss_ema" in lines[-1] and "val_loss_ema" not in others[-1] and "val_loss" in others[-1]
    assert ["val_bits_per_byte_ema" in line for line in lines] == [False, True] * 3
    done = in_process(hf.main, "export", f"run={config.run_dir}", f"out={tmp_path / 'hf'}", "weights=ema")
    assert done.returncode == 0, done.stderr
    changes = {"init_from": f"hf:{tmp_path / 'hf'}", "optim__lr": 1e-30, "ema__decay": None, "train__steps": 2}
    unchanged = settings_of(data, tmp_path / "of-average", **settings | changes)
    run_ranks(2, train_rank, unchanged)
    assert lines_of(unchanged.run_dir)[-1]["val_loss"] == lines[-1]["val_loss_ema"] != lines[-1]["val_loss"]


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(data, tmp_path_factory) -> Path:
    config = settings_of(data, tmp_path_factory.mktemp("straight") / "run", **SPLIT, **MUON)
    freeze(config, open_data(config.data))
    run_ranks(2, train_rank, config)
    return config.run_dir


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_resume_is_bit_exact(data, tmp_path, engine):
    for name, stops in (("straight", [STEPS]), ("parts", [3, STEPS])):
        for stop in stops:
            changes = {"engine": ENGINES[engine], "vocab__untie_at": 3, "train__stop_after": stop}
            run_ranks(2, train_rank, settings_of(data, tmp_path / name, **changes))
    whole, parts = (saved_tensors(tmp_path / name) for name in ("straight", "parts"))
    assert whole.keys() == parts.keys() >= {"ema.head.weight", "ema.blocks.0.mlp.up.weight"}
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
    masses = [read_manifest(checkpoints(tmp_path / name)[-1])["hooks"] for name in ("straight", "parts")]
    assert masses[0] == masses[1] == {"ema.mass": pytest.approx(1 - DECAY**STEPS, rel=1e-14)}


@pytest.mark.parametrize("world,engine", [(1, "zero2"), (3, "fsdp2"), (4, "zero3")])
def test_any_engine_and_world_loads_the_same_bits(data, straight, tmp_path, world, engine):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    changes = SPLIT | MUON | {"engine": ENGINES[engine], "checkpoint__every": 0}
    changes |= {"train__micro_batch": 2 if world == 3 else 3}
    found = run_ranks(world, loaded_average, settings_of(data, run, **changes))
    for name, tensor in weights_of(checkpoints(straight)[-1], "ema.").items():
        assert all(torch.equal(of_rank[name], tensor) for of_rank in found), name


def loaded_average(rank: int, world: int, config: JobConfig) -> dict[str, Tensor]:
    """Whole tensors of the average after a resume."""
    kept: dict[str, Tensor] = {}
    begin = ema.EmaHook.before_training

    def watched(self, trainer):
        begin(self, trainer)
        for name, tensor in self.state_dict().items():
            if isinstance(tensor, DTensor):
                kept[name.removeprefix("ema.")] = tensor.full_tensor().clone()

    ema.EmaHook.before_training = watched
    train_rank(rank, world, config)
    ema.EmaHook.before_training = begin
    return kept


def test_average_can_be_turned_on_and_off(data, tmp_path):
    run = tmp_path / "run"
    off = {"ema__decay": None, "checkpoint__every": 0}
    run_ranks(2, train_rank, settings_of(data, run, **off, train__stop_after=2))
    run_ranks(2, train_rank, settings_of(data, run, train__stop_after=4))
    step_3, step_4 = checkpoints(run)[-2:]
    first, last, average = weights_of(step_3), weights_of(step_4), weights_of(step_4, "ema.")
    for name, weight in first.items():
        expected = (DECAY * weight.double() + last[name].double()) / (1 + DECAY)
        np.testing.assert_allclose(average[name], expected, rtol=1e-6, atol=1e-8)
    run_ranks(2, train_rank, settings_of(data, run, **off))
    assert not [name for name in saved_tensors(run) if name.startswith("ema.")]


def test_generate_and_export_choose_the_average(straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    for weights, prefix in (("last", ""), ("ema", "ema.")):
        done = in_process(hf.main, "export", f"run={run}", f"out={tmp_path / weights}", f"weights={weights}")
        assert done.returncode == 0, done.stderr
        theirs = load_file(tmp_path / weights / "model.safetensors")
        ours = weights_of(checkpoints(run)[-1], prefix)
        assert torch.equal(theirs["transformer.wte.weight"], ours["embedding.weight"][: len(theirs["lm_head.weight"])])
        assert torch.equal(theirs["lm_head.weight"], ours["head.weight"][: len(theirs["lm_head.weight"])])
    texts = []
    for weights in ("last", "ema"):
        settings = GenerateConfig(run=str(run), weights=weights, prompt="the", tokens=30, temperature=0)
        texts.append("".join(generate(settings, torch.device("cpu"))))
    assert texts[0].startswith("the") and texts[1].startswith("the") and texts[0] != texts[1]
    done = in_process(hf.main, "export", f"out={tmp_path / 'x'}", f"run={run}", "weights=mean")
    assert done.returncode == 2 and "weights=mean must be last or ema" in done.stderr


def test_missing_average_is_named(data, tmp_path):
    run = tmp_path / "run"
    run_ranks(1, train_rank, settings_of(data, run, ema__decay=None, train__stop_after=1))
    done = in_process(hf.main, "export", f"run={run}", f"out={tmp_path / 'x'}", "weights=ema")
    assert done.returncode == 2 and "weights=ema must be last: " in done.stderr
    with pytest.raises(ValueError, match=r"^weights=ema must be last: .* has no running average"):
        next(generate(GenerateConfig(run=str(run), weights="ema"), torch.device("cpu")))


@pytest.mark.parametrize("settings", [{"decay": 0.0}, {"decay": 1.0}, {"decay": 0.9, "every": 0}])
def test_settings_have_rules(settings):
    with pytest.raises(ValueError, match=r"^ema\.(decay|every)=\S+ must be "):
        EmaConfig(**settings)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
@pytest.mark.parametrize(
    "engine", [["engine.hsdp=true"], *(["engine=deepspeed", f"engine.zero_stage={n}"] for n in range(4))]
)
def test_plan_counts_four_bytes_per_number(engine, optim):
    settings = [*SMALL, f"optim={optim}", *engine]
    plain, kept = (step_of(configured(*settings, *more), 5000, 2, 4, GPU) for more in ([], ["ema.decay=0.999"]))
    assert average_of(plain, kept) == 4 * (plain.body.stepped + plain.shard.rows * plain.work.width)


@pytest.mark.parametrize("engine", [[], ["engine=deepspeed", "engine.zero_stage=3"]])
def test_plan_counts_no_average_in_host_memory(engine):
    settings = [*SMALL, *engine, "engine.offload=cpu", "vocab.tie=untied"]
    plain, kept = (step_of(configured(*settings, *more), 5000, 2, 4, GPU) for more in ([], ["ema.decay=0.999"]))
    assert average_of(plain, kept) == 4 * 2 * plain.shard.rows * plain.work.width


def average_of(plain: StepCost, kept: StepCost) -> int:
    """Bytes of the average, the same in each phase. The other items must not change."""
    averages = set()
    for name, items in plain.phases().items():
        found = {item.name: item.bytes for item in kept.phases()[name]}
        averages.add(found.pop("average"))
        assert found == {item.name: item.bytes for item in items}
    (average,) = averages
    return average
