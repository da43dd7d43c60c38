"""Shows what the model saw: `python -m pretrain.data --help`. Reads the index and a batch's tokens; starts no rank."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep import terminal
from data_prep.arguments import count_of, key_values
from data_prep.command import arguments_or, compose_settings, one_line
from data_prep.tokenizer import Tokenizer

from ..checkpoint import CheckpointError, checkpoints, read_manifest, step_of
from ..compose import build_config, load_config, register_groups
from ..config.job import CONFIG_FILE, JobConfig
from ..corpora import samples
from ..data import open_data
from ..data.dataset import Windows
from ..data.samples import Samples

NUMBERS = ("step", "rank", "world")
MOST_STEPS = 2**40  # times a batch, it still is a number of samples
HELP = """What did the model see?

  python -m pretrain.data show run=runs/a step=1234                  the batch of that step: its documents and tokens
  python -m pretrain.data show run=runs/a step=1234 rank=3 world=8   what rank 3 of 8 saw of it
  python -m pretrain.data show data.path=data/mine step=1234 train.global_batch=64 seed=1
                                                                     of a run that has those settings

Steps are numbered as in metrics.jsonl. From the newest checkpoint before it on, the run's present settings are taken to
hold. On a terminal each token has a shade of its own, each document a colour; a line tells where it lies in its file.
"""
COLOURS = ((24, 31), (58, 64), (90, 97), (94, 130))  # of a document: two shades for its tokens, of 256


@dataclass(frozen=True)
class Request:
    """step: 1 is the first. rank of world: whose part; null: the whole batch."""

    config: JobConfig
    run: Path | None
    step: int
    rank: int | None
    world: int


def main() -> None:
    """Exits 0, or 2 with one line on a wrong command."""
    with one_line(CheckpointError):
        arguments = arguments_or(HELP)
        if arguments[0] != "show":
            raise ValueError(f"{arguments[0]} must be show; see --help")
        terminal.product()
        for line in show(_request(arguments[1:]), coloured=sys.stdout.isatty()):
            print(line)


def _request(arguments: list[str]) -> Request:
    given = key_values(arguments)
    settings = [argument for argument in arguments if argument.partition("=")[0] not in ("run", *NUMBERS)]
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
            raise ValueError(f"{settings[0]} is not for run={given['run']}, which has settings of its own")
        config = load_config(Path(given["run"]) / CONFIG_FILE)
    else:
        register_groups()
        config = build_config(compose_settings("train", ["run.dir=unused", *settings]))
    config.train.check_world(world)
    run = Path(given["run"]) if "run" in given else None
    return Request(config, run, step, rank, world)


def show(request: Request, coloured: bool) -> Iterator[str]:
    """The lines to print."""
    config, train = request.config, request.config.train
    data = open_data(config.data)
    drawn = samples(config, data)
    tokenizer = None if data.tokenizer is None else Tokenizer.load(data.tokenizer)
    consumed = _consumed(request, drawn)
    first = sum(consumed.values())
    titles = {id(windows): title for title, (windows, _) in drawn.sources.items()}
    yield f"step {request.step:,}: samples {first:,} to {first + train.global_batch - 1:,}"
    for i, (windows, index) in enumerate(drawn.next(consumed, train.global_batch)):
        rank = i // train.micro_batch % request.world
        if request.rank in (None, rank):
            part = f"rank {rank} of {request.world}, " if request.world > 1 else ""
            yield f"\nsample {first + i:,}: {part}{titles[id(windows)]}, window {index:,} of {len(windows):,}"
            yield from _documents(windows, index, tokenizer, coloured)


def _consumed(request: Request, samples: Samples) -> dict[str, int]:
    """Samples that the run had consumed before that step, counted on from its newest checkpoint before it."""
    steps, consumed = request.step - 1, {}
    for folder in reversed(checkpoints(request.run) if request.run else []):
        if step_of(folder) < request.step:
            consumed = read_manifest(folder)["samples"]
            steps -= step_of(folder)
            break
    return samples.after(consumed, steps * request.config.train.global_batch)


def _documents(windows: Windows, index: int, tokenizer: Tokenizer | None, coloured: bool) -> Iterator[str]:
    tokens = windows[index].tokens_T
    for part in windows.documents(index):
        yield f"  {part.file.prefix.name}, document {part.document:,} from its token {part.offset:,}"
        shades = COLOURS[part.document % len(COLOURS)]
        yield _text(tokens[part.start : part.stop], tokenizer, shades if coloured else None)


def _text(ids: np.ndarray, tokenizer: Tokenizer | None, shades: tuple[int, int] | None) -> str:
    """The tokens' text, or their ids where there is no tokenizer."""
    if shades is None:
        return " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids)
    pieces = []
    for i, id in enumerate(ids.tolist()):
        text = f" {id}" if tokenizer is None else tokenizer.decode([id])
        lines = text.split("\n")  # a shade must not run on to the end of a line
        on, off = f"\033[48;5;{shades[i % 2]}m", "\033[0m"
        pieces.append(f"{off}\n{on}".join([on + lines[0], *lines[1:]]) + off)
    return "".join(pieces)


if __name__ == "__main__":
    main()
