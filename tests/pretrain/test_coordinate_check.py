"""A coordinate check measures what a dense model has, on any ranks, and names what depends on the width."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pretrain.commands import coordinate_check as command
from pretrain.commands.coordinate_run import train
from pretrain.config.job import JobConfig
from pretrain.coordinate_check.points import Point, Training, coordinates, losses, slope, verdict
from pretrain.corpora import samples
from pretrain.data import open_data
from pretrain.stops import StopRequests
from tests.in_process import in_process
from tests.pretrain.dense import DenseModel, dense_training
from tests.pretrain.tiny import VOCAB, tiny_config, write_tokens
from tests.ranks import run_ranks
from tests.warm import torchrun

ROOT = Path(__file__).resolve().parents[2]
MODEL = "model=nano model.layers=1 model.width=32 model.heads=2 model.context=16 vocab.size=307 vocab.multiple=8"
SMALL = f"{MODEL} train.global_batch=4 train.micro_batch=2 train.precision=fp32 optim.lr=1e-2".split()


def trained(rank: int, world: int, config: JobConfig) -> Training:
    with StopRequests() as requests:
        return train(config.model.width, 0, config, open_data(config.data), torch.device("cpu"), requests)


def dense_sizes(config: JobConfig) -> dict[str, float]:
    """Sizes of the activations before the first step, in float64."""
    model = DenseModel(config, torch.float64)
    ((windows, index),) = samples(config, open_data(config.data)).next({}, 1)
    tokens = torch.from_numpy(windows[index].tokens_T)[None]
    x = F.embedding(tokens, model.weight)
    found = {"embedding": x}
    x = x + model.body.positions[: tokens.shape[1]]
    for i, block in enumerate(model.body.blocks):
        found[f"block {i} attention"] = block.attention(block.norm1(x))
        x = x + found[f"block {i} attention"]
        found[f"block {i} mlp"] = block.mlp(block.norm2(x))
        x = x + found[f"block {i} mlp"]
        found[f"block {i}"] = x
    found["logits"] = model.body.norm(x) @ model.head_weight[:VOCAB].T
    return {name: float(value.detach().abs().mean()) for name, value in found.items()}


@pytest.mark.parametrize("world,engine", [(1, "fsdp2"), (2, "deepspeed"), (3, "fsdp2")])
def test_sizes_and_losses_match_dense(tmp_path, world, engine):
    settings = {"train__steps": 4, "vocab__tie": "untied", "vocab__parallel": world, "engine__name": engine}
    config = tiny_config(write_tokens(tmp_path / "tokens"), tmp_path / "run", **settings, train__micro_batch=2)
    found, dense = run_ranks(world, trained, config)[0], dense_training(config)
    before = {point.name: point for point in found.points if point.step == 0}
    assert {name: point.size for name, point in before.items()} == pytest.approx(dense_sizes(config), rel=1e-5)
    assert all(point.change == 0 for point in before.values())
    assert found.losses == pytest.approx(dense.losses, rel=1e-5)
    after = [point for point in found.points if point.step == 4]
    assert len(after) == len(before) and all(point.change > 0 for point in after)
    assert not config.run_dir.exists()


def test_slopes_and_verdict():
    assert slope({64: 3.0, 128: 3.0 / 2**0.5, 512: 3.0 / 8**0.5}) == pytest.approx(-0.5)
    exponents = {"flat": (0.0, 0.05), "grows": (0.5, 1.0), "shrinks": (0.0, -0.5)}

    def training(width: int, seed: int) -> Training:
        points = [Point(0, name, 1.0, 0.0) for name in exponents]
        points += [Point(20, name, (seed + 1) * width**a, width**b) for name, (a, b) in exponents.items()]
        return Training(width, seed, points, [9.0] * 18 + [float(width), float(width + 2 * seed)])

    trainings = [training(width, seed) for seed in range(2) for width in (16, 32, 64)]
    found = coordinates(trainings)
    assert [one.at_start for one in found] == [0, 0, 0]
    assert [one.at_end for one in found] == pytest.approx([0, 0.5, 0])
    assert [one.of_change for one in found] == pytest.approx([0.05, 1, -0.5])
    assert found[1].sizes == pytest.approx({width: 1.5 * width**0.5 for width in (16, 32, 64)})
    assert verdict(found) == [
        "grows: grows with the width (slope of the size +0.50, of the change +1.00)",
        "shrinks: shrinks with the width (slope of the size +0.00, of the change -0.50)",
    ]
    assert verdict([found[0]._replace(of_change=math.nan)])[0].startswith("flat: is 0 or not finite at a width (")
    assert verdict(found[:1]) == ["No activation depends on the width: all slopes are within ±0.1 after the last step."]
    assert losses(trainings) == {width: width + 0.5 for width in (16, 32, 64)}


def test_command_compares_widths_on_two_ranks(tmp_path):
    """An attention block grows fast without optim.base_width, and not with it."""
    data, slopes = write_tokens(tmp_path / "tokens"), {}
    for base in ("null", "16"):
        given = [*SMALL, f"data.path={data}", f"optim.base_width={base}", "widths=16,256", "steps=6", "seeds=2"]
        done = torchrun(2, "-m", "pretrain.coordinate_check", *given, f"out={tmp_path / base}.html", cwd=ROOT)
        assert done.returncode == 0 and not done.stderr, done.stderr
        lines = done.stdout.splitlines()
        assert lines[-1] == f"page: {tmp_path / base}.html" and lines[0].split()[-2:] == ["16", "256"]
        slopes[base] = {
            match[1]: float(match[2])
            for match in re.finditer(r"^(\S.*?) +\S+ +\S+ +([+-]\S+) +\S+ +\S+$", done.stdout, re.M)
        }
        sheet = json.loads(re.search(r"const sheet = (.*);\n", (tmp_path / f"{base}.html").read_text())[1])
        sizes, changes, by_step = sheet["charts"]["Activations"]
        assert [len(line["points"]) for line in sizes["lines"] + changes["lines"]] == [2] * 10
        assert [at for at, _ in by_step["lines"][0]["points"]] == [0, 1, 2, 3, 4, 5, 6]
        assert ("block 0: grows with the width" in done.stdout) == (base == "null")
    assert slopes["null"]["block 0 attention"] > 1 > 0.3 > abs(slopes["16"]["block 0 attention"]), slopes


@pytest.mark.parametrize(
    "arguments,message",
    [
        ("widths=16", "widths=16 must be at least two widths"),
        ("widths=16,x", "widths=x must be a number"),
        ("widths=16,40", "widths=16,40 must be multiples of 16: model.heads=2 grow in proportion to model.width=32"),
        ("steps=0", "steps=0 and seeds=1 must be at least 1"),
        ("optim.lr=null", "optim.lr is missing: give the rate to check"),
        ("train.steps=5", "train.steps must not be given: the check has its own"),
        ("train.stop_after=5", "train.stop_after must not be given: the check has its own"),
        ("out={tmp}", "out={tmp} is a folder: name a file"),
        ("out={tmp}/no/a.html", "must be in a folder that exists: {tmp}/no does not"),
        ("optim.base_width=0", "optim.base_width=0 must be at least 1"),
        ("model.size=5", "unknown key model.size"),
    ],
)
def test_wrong_command_is_one_line(tmp_path, arguments, message):
    given = [*SMALL, f"data.path={tmp_path}", *arguments.format(tmp=tmp_path).split()]
    done = in_process(command.main, *given, cwd=tmp_path)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert message.format(tmp=tmp_path) in done.stderr
