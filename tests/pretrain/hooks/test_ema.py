"""The running average of the weights is that of the dense weights, on every engine, and survives a resume."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from launch.step import StepCost
from pretrain.checkpoint import checkpoints, read_manifest, step_of
from pretrain.checkpoint.rows import CheckpointRows
from pretrain.commands import hf
from pretrain.compose import freeze
from pretrain.config.ema import EmaConfig
from pretrain.config.generation import GenerateConfig
from pretrain.config.job import JobConfig
from pretrain.data import open_data
from pretrain.generation import generate, load_model
from pretrain.hooks import ema
from tests.in_process import in_process
from tests.launch.test_plan import GPU, SMALL, configured
from tests.launch.test_plan import step_of as cost_of
from tests.pretrain.engine.test_engines import ENGINES
from tests.pretrain.helpers import make_corpus
from tests.pretrain.tiny import saved_tensors, tiny_config, train_rank
from tests.ranks import run_ranks

STEPS, DECAY = 4, 0.8
SETTINGS = {
    "train__steps": STEPS,
    "checkpoint__every": 1,
    "ema__decay": DECAY,
    "eval__every": 2,
    "model__width": 21,  # not divisible by any number of ranks
    "model__layers": 1,
    "vocab__size": None,
}
SPLIT, MUON, OFFLOAD = {"vocab__untie_at": 2}, {"optim__name": "muon"}, {"engine__offload": "cpu"}
GATHERED = {"engine__reshard_after_forward": False}  # an evaluation then leaves weights gathered
CASES: dict[str, dict[str, object]] = {  # settings per engine, on two ranks
    "fsdp2": SPLIT | GATHERED,
    "hsdp": MUON | SPLIT,
    "zero0": MUON | {"ema__every": 2},
    "zero1": MUON | SPLIT | {"train__precision": "auto"},
    "zero2": OFFLOAD,
    "zero3": MUON,
}
WATCHED = ("fsdp2", "zero1", "zero3")  # the three ways to set the weights that the forward uses


def settings_of(data: Path, run: Path, engine: str, world: int = 2, **changes: object) -> JobConfig:
    settings = SETTINGS | {"engine": ENGINES[engine], "train__micro_batch": 12 // world} | changes
    return tiny_config(data, run, **settings)


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
    assert [step_of(folder) for folder in checkpoints(run)] == list(range(1, STEPS + 1))
    truth, found = truth_of(run, every), weights_of(checkpoints(run)[-1], "ema.")
    last = weights_of(checkpoints(run)[-1])
    assert found.keys() == truth.keys() == last.keys()
    for name, tensor in truth.items():
        np.testing.assert_allclose(found[name], tensor, rtol=1e-6, atol=2e-7 * float(tensor.abs().max()), err_msg=name)
        assert not torch.allclose(found[name], last[name], rtol=1e-4, atol=1e-5), f"{name} did not move"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("ema") / "data", val=160)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> tuple[Path, dict[str, list[bool]]]:
    """The folder of the runs of `train_all`, and what the ranks saw."""
    folder = tmp_path_factory.mktemp("trained")
    seen, others = run_ranks(2, train_all, data, folder, timeout=240)
    assert seen == others
    return folder, seen


def train_all(rank: int, world: int, data: Path, folder: Path) -> dict[str, list[bool]]:
    """Trains all runs on two ranks in the same processes, as each new process costs seconds."""
    seen = {}
    for engine, changes in CASES.items():
        config = settings_of(data, folder / engine, engine, **changes)
        if rank == 0:
            freeze(config, open_data(config.data))
        seen[engine] = swaps(rank, world, config)
    for engine in WATCHED:
        changes = CASES[engine]
        off = {"eval__every": 0, "ema__decay": None, "checkpoint__every": 0}
        train_rank(rank, world, settings_of(data, folder / f"{engine}-plain", engine, **changes | off))
        exported = folder / f"{engine}-exported"
        if rank == 0:
            done = in_process(hf.main, "export", f"run={folder / engine}", f"out={exported}", "weights=ema")
            assert done.returncode == 0, done.stderr
        dist.barrier()
        frozen = off | {"init_from": f"hf:{exported}", "optim__lr": 1e-30, "train__steps": 2, "vocab__untie_at": None}
        frozen |= {"vocab__tie": "untied" if "vocab__untie_at" in changes else "tied"}
        train_rank(rank, world, settings_of(data, folder / f"{engine}-of-average", engine, **changes | frozen))
    for engine in ("fsdp2", "zero3"):
        for stop in (2, STEPS):
            config = settings_of(data, folder / f"{engine}-parts", engine, **CASES[engine], train__stop_after=stop)
            train_rank(rank, world, config)
    for stop, changes in ((1, {"ema__decay": None}), (3, {}), (4, {"ema__decay": None})):
        train_rank(rank, world, settings_of(data, folder / "on-off", "fsdp2", train__stop_after=stop, **changes))
    return seen


def swaps(rank: int, world: int, config: JobConfig) -> list[bool]:
    """Trains. Two results per evaluation: the model had the average's bits inside, and its own bits again after it."""
    seen: list[bool] = []
    swapped = ema.EmaHook.swapped

    def watched(self):
        before = bits_of(self)
        average = {name: t for name, t in before.items() if name.startswith("ema.")}
        with swapped(self):
            inside = bits_of(self)
        seen.append(all(torch.equal(inside[name.removeprefix("ema.")], t) for name, t in average.items()))
        after = bits_of(self)
        seen.append(before.keys() == after.keys() and all(torch.equal(after[name], t) for name, t in before.items()))
        return swapped(self)

    ema.EmaHook.swapped = watched
    try:
        train_rank(rank, world, config)
    finally:
        ema.EmaHook.swapped = swapped
    return seen


def bits_of(hook: ema.EmaHook) -> dict[str, Tensor]:
    parts = hook.parts
    state = {**parts.engine.state(), **hook.state_dict()}
    state |= {name: rows.detach() for name, rows in parts.model.vocab.named_rows().items()}
    tensors = {name: t for name, t in state.items() if isinstance(t, Tensor)}
    return {name: (t.to_local() if isinstance(t, DTensor) else t).clone() for name, t in tensors.items()}


@pytest.mark.parametrize("engine", CASES)
def test_average_is_the_float64_recursion(trained, engine):
    """Covers both optimizers, with and without a split of the matrix, and an update every second step."""
    folder, seen = trained
    assert_average(folder / engine, every=CASES[engine].get("ema__every", 1))
    assert seen[engine] == [True] * 4
    saved = read_manifest(checkpoints(folder / engine)[-1])["tensors"]
    momentum = "optim.momentum_buffer.blocks.0.mlp.up.weight" in saved
    assert momentum == (CASES[engine].get("optim__name") == "muon")


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("engine", WATCHED)
def test_evaluation_of_the_average_is_that_of_its_weights(trained, engine):
    """A run that begins with the average as its weights, and learns nothing, has the same validation loss.

    A run without evaluations has the same training losses: each swap is undone, also in the copies of the engine.
    """
    folder, _ = trained
    lines, others, frozen = (lines_of(folder / f"{engine}{kind}") for kind in ("", "-plain", "-of-average"))
    assert [line["loss"] for line in lines] == [line["loss"] for line in others]
    assert "val_loss" in others[-1] and "val_loss_ema" not in others[-1]
    assert ["val_bits_per_byte_ema" in line for line in lines] == [False, True] * 2
    assert frozen[-1]["val_loss"] == lines[-1]["val_loss_ema"] != lines[-1]["val_loss"]


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_resume_is_bit_exact(trained, engine):
    folder, _ = trained
    runs = folder / engine, folder / f"{engine}-parts"
    whole, parts = (saved_tensors(run) for run in runs)
    assert whole.keys() == parts.keys() >= {"ema.embedding.weight", "ema.blocks.0.mlp.up.weight"}
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name
    numbers = [read_manifest(checkpoints(run)[-1])["hooks"] for run in runs]
    assert numbers[0] == numbers[1] and numbers[0]["ema.mass"] == pytest.approx(1 - DECAY**STEPS, rel=1e-14)


@pytest.mark.parametrize("world,engine", [(1, "zero2"), (3, "fsdp2"), (4, "zero3")])
def test_any_engine_and_world_continues_it(data, trained, tmp_path, world, engine):
    """Resumes FSDP2's run of two ranks: the loaded bits are the saved ones, and the recursion goes on."""
    run = Path(shutil.copytree(trained[0] / "fsdp2", tmp_path / "run"))
    *_, saved, third, fourth = checkpoints(run)
    shutil.rmtree(third)
    shutil.rmtree(fourth)
    found = run_ranks(world, loaded_average, settings_of(data, run, engine, world, eval__every=0, **SPLIT))
    average = weights_of(saved, "ema.")
    for of_rank in found:
        assert of_rank.keys() == average.keys()
        assert all(torch.equal(of_rank[name], tensor) for name, tensor in average.items())
    assert_average(run)


def loaded_average(rank: int, world: int, config: JobConfig) -> dict[str, Tensor]:
    """Resumes and trains. Returns whole tensors of the average from before the first step."""
    kept: dict[str, Tensor] = {}
    begin = ema.EmaHook.before_training

    def watched(self, trainer):
        begin(self, trainer)
        for name, tensor in self.state_dict().items():
            if isinstance(tensor, DTensor):
                kept[name.removeprefix("ema.")] = tensor.full_tensor().clone()

    ema.EmaHook.before_training = watched
    train_rank(rank, world, config)
    return kept


def test_average_can_be_turned_on_and_off(trained):
    run = trained[0] / "on-off"
    step_1, step_2, step_3, step_4 = checkpoints(run)
    second, third, average = weights_of(step_2), weights_of(step_3), weights_of(step_3, "ema.")
    for name, weight in second.items():
        expected = (DECAY * weight.double() + third[name].double()) / (1 + DECAY)
        np.testing.assert_allclose(average[name], expected, rtol=1e-6, atol=1e-8)
    for folder in (step_1, step_4):
        assert not [name for name in read_manifest(folder)["tensors"] if name.startswith("ema.")]


@pytest.mark.parametrize("weights,prefix", [("last", ""), ("ema", "ema.")])
def test_generate_and_export_choose_the_average(trained, tmp_path, weights, prefix):
    run = trained[0] / "fsdp2"
    last, ours = checkpoints(run)[-1], weights_of(checkpoints(run)[-1], prefix)
    done = in_process(hf.main, "export", f"run={run}", f"out={tmp_path / 'hf'}", f"weights={weights}")
    assert done.returncode == 0, done.stderr
    theirs = load_file(tmp_path / "hf" / "model.safetensors")
    for name, own in (("transformer.wte.weight", "embedding.weight"), ("lm_head.weight", "head.weight")):
        assert torch.equal(theirs[name], ours[own][: len(theirs[name])])
    model, _ = load_model(last, torch.device("cpu"), weights)
    loaded = dict(model.body.named_parameters()) | model.vocab.named_rows()
    assert loaded.keys() == ours.keys()
    for name, tensor in ours.items():
        assert torch.equal(loaded[name][: len(tensor)], tensor), name
    settings = GenerateConfig(run=str(run), weights=weights, prompt="the", tokens=3)
    assert "".join(generate(settings, torch.device("cpu"))).startswith("the")


def test_wrong_choice_of_weights_is_named(trained, tmp_path):
    run = trained[0] / "on-off"
    for weights, expected in (("ema", "weights=ema must be last: "), ("mean", "weights=mean must be last or ema")):
        done = in_process(hf.main, "export", f"run={run}", f"out={tmp_path / 'x'}", f"weights={weights}")
        assert done.returncode == 2 and expected in done.stderr and not any(tmp_path.iterdir())
    shutil.copytree(trained[0] / "fsdp2" / "tokenizer", run / "tokenizer", dirs_exist_ok=True)
    with pytest.raises(ValueError, match=r"^weights=ema must be last: .* has no running average"):
        next(generate(GenerateConfig(run=str(run), weights="ema"), torch.device("cpu")))


@pytest.mark.parametrize("settings", [{"decay": 0.0}, {"decay": 1.0}, {"decay": 0.9, "every": 0}])
def test_settings_have_rules(settings):
    with pytest.raises(ValueError, match=r"^ema\.(decay|every)=\S+ must be "):
        EmaConfig(**settings)


@pytest.mark.parametrize(
    "engine,optim",
    [("engine.hsdp=true", "muon"), *((f"engine.zero_stage={n}", ("adamw", "muon")[n % 2]) for n in range(4))],
)
def test_plan_counts_four_bytes_per_number(engine, optim):
    of_engine = [engine] if "hsdp" in engine else ["engine=deepspeed", engine]
    plain, kept = costs(f"optim={optim}", *of_engine)
    assert average_of(plain, kept) == 4 * (plain.body.stepped + plain.shard.rows * plain.work.width)


@pytest.mark.parametrize("engine", [[], ["engine=deepspeed", "engine.zero_stage=3"]])
def test_plan_counts_no_average_in_host_memory(engine):
    plain, kept = costs(*engine, "engine.offload=cpu", "vocab.tie=untied")
    assert average_of(plain, kept) == 4 * 2 * plain.shard.rows * plain.work.width


def costs(*settings: str) -> tuple[StepCost, StepCost]:
    """Cost of a step without and with an average."""
    job = configured(*SMALL, *settings)
    kept = replace(job, ema=EmaConfig(decay=0.999))
    return cost_of(job, 5000, 2, 4, GPU), cost_of(kept, 5000, 2, 4, GPU)


def average_of(plain: StepCost, kept: StepCost) -> int:
    """Bytes of the average, the same in each phase. The other items must not change."""
    averages = set()
    for name, items in plain.phases().items():
        found = {item.name: item.bytes for item in kept.phases()[name]}
        averages.add(found.pop("average"))
        assert found == {item.name: item.bytes for item in items}
    (average,) = averages
    return average
