"""Shows the batch of a step: `python -m pretrain.data --help`. Reads the index and the batch's tokens, no model."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep import terminal
from data_prep.arguments import count_of, key_values
from data_prep.command import arguments_or, compose_settings, one_line
from data_prep.tokenizer import Tokenizer

from ..checkpoint import CheckpointError, checkpoints, newest_manifest, read_manifest, step_of
from ..compose import build_config, load_config, register_groups
from ..config.job import CONFIG_FILE, JobConfig
from ..corpora import samples
from ..data import open_data
from ..data.dataset import Windows
from ..data.samples import Samples

KEYS = {
    "run": "folder of the run; without it, give the settings of a training",
    "step": "step whose batch to show, from 1 on; default: 1",
    "rank": "show only the part of this rank; default: the whole batch",
    "world": "number of ranks, for rank; default: 1",
}
NUMBERS = ("step", "rank", "world")
MOST_STEPS = 2**40  # times a batch, it is still a valid number of samples
HELP = """Shows what the model saw at a step.

  python -m pretrain.data show run=runs/a step=1234                  the batch of that step: its documents and tokens
  python -m pretrain.data show run=runs/a step=1234 rank=3 world=8   what rank 3 of 8 saw of it
  python -m pretrain.data show data.path=data/mine step=1234 train.global_batch=64 seed=1
                                                                     of a run with these settings

Steps are numbered as in metrics.jsonl. After the newest checkpoint before the step, the run's current settings apply.
On a terminal each document has a colour, and neighbouring tokens differ in shade. A line names the document's place.
"""
COLOURS = ((24, 31), (58, 64), (90, 97), (94, 130))  # of the 256 of a terminal; two shades per document


@dataclass(frozen=True)
class Request:
    """Arguments of the command. step: 1 is the first. rank: of `world` ranks; None for the whole batch."""

    config: JobConfig
    run: Path | None
    step: int
    rank: int | None
    world: int


def main() -> None:
    """Runs the command. Exits with 0, or with 2 and one line if the command is wrong."""
    with one_line(CheckpointError):
        arguments = arguments_or(HELP)
        if arguments[0] != "show":
            raise ValueError(f"{arguments[0]} must be show; see --help")
        terminal.product()
        for line in show(_request(arguments[1:]), coloured=sys.stdout.isatty()):
            print(line)


def _request(arguments: list[str]) -> Request:
    given = key_values(arguments)
    settings = [argument for argument in arguments if argument.partition("=")[0] not in KEYS]
    numbers = {key: count_of(key, given[key]) for key in NUMBERS if key in given}
    step, rank, world = numbers.get("step", 1), numbers.get("rank"), numbers.get("world", 1)
    for key, number in (("step", step), ("world", world)):
        if number < 1:
            raise ValueError(f"{key}={number} must be at least 1")
    if step > MOST_STEPS:
        raise ValueError(f"step={step} must be at most {MOST_STEPS}")
    if rank is not None and rank >= world:
        raise ValueError(f"rank={rank} must be below world={world}")
    if "run" in given:
        if settings:
            raise ValueError(f"{settings[0]} must not be given with run={given['run']}, which has its own settings")
        config = load_config(Path(given["run"]) / CONFIG_FILE)
    else:
        register_groups()
        config = build_config(compose_settings("train", ["run.dir=unused", *settings]))
    config.train.check_world(world)
    run = Path(given["run"]) if "run" in given else None
    return Request(config, run, step, rank, world)


def show(request: Request, coloured: bool) -> Iterator[str]:
    """Yields the lines to print."""
    config, train = request.config, request.config.train
    data = open_data(config.data)
    drawn = samples(config, data).without(_left_out(request))
    tokenizer = None if data.tokenizer is None else Tokenizer.load(data.tokenizer)
    consumed = _consumed(request, drawn)
    size = train.batches.size_at(drawn.start(consumed))
    numbers = drawn.numbers(consumed, size)
    titles = {id(windows): title for title, (windows, _) in drawn.sources.items()}
    yield f"step {request.step:,}: samples {numbers[0]:,} to {numbers[-1]:,}"
    for i, (windows, index) in enumerate(drawn.next(consumed, size)):
        rank = i // train.micro_batch % request.world
        if request.rank in (None, rank):
            part = f"rank {rank} of {request.world}, " if request.world > 1 else ""
            yield f"\nsample {numbers[i]:,}: {part}{titles[id(windows)]}, window {index:,} of {len(windows):,}"
            yield from _documents(windows, index, tokenizer, coloured)


def _consumed(request: Request, samples: Samples) -> dict[str, int]:
    """Samples consumed before the step, counted from the newest checkpoint before it."""
    steps, consumed = request.step - 1, {}
    began = [Path(request.config.decay_from)] if request.config.decay_from else []
    for folder in reversed([*began, *checkpoints(request.run)] if request.run else []):
        if step_of(folder) < request.step:
            consumed = read_manifest(folder)["samples"]
            steps -= step_of(folder)
            break
    return samples.after_steps(consumed, steps, request.config.train.batches)


def _left_out(request: Request) -> list[list[int]]:
    """Samples that the guard of a run has left out, up to its newest checkpoint, or the one that it decays from."""
    manifest = newest_manifest(request.run) if request.run else None
    if manifest is None and request.run and request.config.decay_from:
        manifest = read_manifest(Path(request.config.decay_from))
    return [] if manifest is None else manifest.get("left_out", [])


def _documents(windows: Windows, index: int, tokenizer: Tokenizer | None, coloured: bool) -> Iterator[str]:
    tokens = windows[index].tokens_T
    for part in windows.documents(index):
        yield f"  {part.file.prefix.name}, document {part.document:,} from its token {part.offset:,}"
        shades = COLOURS[part.document % len(COLOURS)]
        yield _text(tokens[part.start : part.stop], tokenizer, shades if coloured else None)


def _text(ids: np.ndarray, tokenizer: Tokenizer | None, shades: tuple[int, int] | None) -> str:
    """Text of the tokens, or their ids without a tokenizer."""
    if shades is None:
        return " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)
    pieces = []
    for i, id in enumerate(ids.tolist()):
        text = f" {id}" if tokenizer is None else tokenizer.decode([id])
        lines = text.split("\n")  # a shade must end before the end of the line
        on, off = f"\033[48;5;{shades[i % 2]}m", "\033[0m"
        pieces.append(f"{off}\n{on}".join([on + lines[0], *lines[1:]]) + off)
    return "".join(pieces)


if __name__ == "__main__":
    main()
