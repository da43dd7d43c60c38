"""Checks that activations do not depend on the width: `python -m pretrain.coordinate_check --help`.

One process holds the whole matrix. Under torchrun its rows are split over the ranks, as in training.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data_prep import terminal
from data_prep.arguments import count_of, key_values
from data_prep.columns import aligned
from data_prep.command import arguments_or, compose_settings, one_line
from data_prep.durable import durable

from ..compose import build_config, register_groups
from ..config.job import JobConfig
from ..coordinate_check.page import page, table
from ..coordinate_check.points import coordinates, losses, verdict
from ..exits import leave
from ..families import ModelConfig

HELP = """Does the learning rate carry over to other widths? Trains some steps at several widths, and measures.

  python -m pretrain.coordinate_check model=nano data.path=data/mine optim.lr=4e-3 optim.base_width=64
  python -m pretrain.coordinate_check model=nano data.path=data/mine optim.lr=4e-3 widths=128,256 steps=100 out=a.html
  torchrun --nproc-per-node 2 -m pretrain.coordinate_check model=nano …           the matrix split over two ranks

After each step it measures the mean absolute value of the activations on one text: of the embedding, of each block and
its parts, and of the logits. It prints the slope of each against the width, on log scales, and says which depend on
the width: with optim.base_width none should. The last row is the training loss, to compare learning rates. One HTML
page has the charts, and needs no network. All settings of a training apply; the number of heads and the inner width of
the MLP grow with the width.
"""
KEYS = {
    "widths": "widths to train, with commas; default: a quarter, half, once and twice model.width, if its heads allow",
    "steps": "steps of each training; default: 10",
    "seeds": "trainings per width, whose sizes are averaged; default: 1",
    "out": "HTML file to write; default: coordinate_check.html",
}
FIXED = ("run.dir", "train.steps", "train.stop_after", "init_from", "decay_from", "resume")  # the check has its own
GROW = ("heads", "kv_heads", "inner")  # sizes of a model that grow with its width
LONGEST = 256  # tokens of the text


@dataclass(frozen=True)
class Request:
    """Arguments of the command: the settings of each training, by width and seed."""

    trainings: dict[tuple[int, int], JobConfig]
    steps: int
    out: Path


def main() -> None:
    """Runs the command. Exits with 0, or with 2 and one line if a setting is wrong."""
    with one_line():
        request = request_of(arguments_or(HELP))
        from ..rendezvous import NotMet  # these need torch
        from .coordinate_run import trained
    with one_line(NotMet, FloatingPointError):
        trainings = trained(request)
        if trainings is None:  # not the first rank
            return
        found, by_width = coordinates(trainings), losses(trainings)
        told = verdict(found)
        with durable(request.out) as file:
            file.write(page("Coordinate check", facts(request), told, found, by_width).encode())
        terminal.product()
        print("\n".join([*aligned(table(found, by_width)), "", *told, f"page: {request.out}"]))


def request_of(arguments: list[str]) -> Request:
    """Reads the arguments. Raises ValueError if one is wrong."""
    given = {key: value for key, value in key_values(arguments).items() if key in KEYS}
    settings = [argument for argument in arguments if argument.partition("=")[0] not in KEYS]
    for setting in settings:
        if (key := setting.partition("=")[0].lstrip("+~")) in FIXED:
            raise ValueError(f"{key} must not be given: the check has its own; see --help")
    steps, seeds = (count_of(key, given.get(key, default)) for key, default in (("steps", "10"), ("seeds", "1")))
    if not steps or not seeds:
        raise ValueError(f"steps={steps} and seeds={seeds} must be at least 1")
    out = Path(given.get("out") or "coordinate_check.html")
    if out.is_dir():
        raise ValueError(f"out={out} is a folder: name a file, such as out={out / 'check.html'}")
    if not out.parent.is_dir():
        raise ValueError(f"out={out} must be in a folder that exists: {out.parent} does not")
    register_groups()
    composed = compose_settings("train", settings)
    OmegaConf.set_struct(composed, False)
    if composed.optim.lr is None:
        raise ValueError("optim.lr is missing: give the rate to check, such as optim.lr=4e-3")
    composed.train.steps, composed.run.dir = steps, f"{out}.run"  # nothing is written there
    widths = widths_of(given.get("widths"), build_config(composed).model)
    return Request(
        {(wide, seed): training(composed, wide, seed) for seed in range(seeds) for wide in widths}, steps, out
    )


def widths_of(text: str | None, model: ModelConfig) -> list[int]:
    """Reads the widths. Raises ValueError if there are less than two, or if GROW cannot grow with one."""
    width, sizes = model.width, {f"model.{key}": getattr(model, key) for key in GROW if hasattr(model, key)}
    unit = math.lcm(*(width // math.gcd(width, size) for size in sizes.values()))
    if not text:
        return [wide for wide in (width // 4, width // 2, width, 2 * width) if wide and wide % unit == 0]
    widths = sorted({count_of("widths", width) for width in text.split(",")})
    if len(widths) < 2 or not widths[0]:
        raise ValueError(f"widths={text} must be at least two widths, such as widths=64,128,256,512")
    if any(width % unit for width in widths):
        grow = ", ".join(f"{key}={size}" for key, size in sizes.items())
        raise ValueError(f"widths={text} must be multiples of {unit}: {grow} grow in proportion to model.width={width}")
    return widths


def training(composed: DictConfig, width: int, seed: int) -> JobConfig:
    """Settings of one training. seed: is added to the seed of the command."""
    settings: Any = OmegaConf.create(OmegaConf.to_container(composed))
    model, seeds = settings.model, settings.seed
    for key in GROW:
        if key in model:
            model[key] = model[key] * width // model.width
    model.width, settings.seed = width, seeds + seed
    return build_config(settings)


def facts(request: Request) -> list[tuple[str, str]]:
    """The settings, for the page."""
    config = next(iter(request.trainings.values()))
    optim, widths = config.optim, sorted({width for width, _ in request.trainings})
    different = {
        f"optim.{owner}.{key}": value
        for owner in ("body", "vocab")
        for key, value in asdict(getattr(optim, owner)).items()
        if value is not None
    }
    return [
        ("model", f"{config.model.family}, {config.model.layers} blocks"),
        ("widths", ", ".join(map(str, widths))),
        ("optimizer", optim.name),
        ("learning rate", f"{optim.lr:g}"),
        ("optim.base_width", "null" if optim.base_width is None else str(optim.base_width)),
        *((key, str(value)) for key, value in different.items()),
        ("steps", f"{request.steps:,}"),
        ("trainings per width", str(len(request.trainings) // len(widths))),
        ("sequences per step", f"{config.train.global_batch} of {config.seq_len} tokens"),
        ("data", ", ".join(config.data.paths.values())),
    ]


if __name__ == "__main__":
    leave(main)
