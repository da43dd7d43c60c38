"""Metrics of a run: scalars in `RUN/metrics.jsonl`, in TensorBoard, and on the terminal; its restarts. Rank 0 only."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

import numpy as np

from data_prep.durable import durable

from ..config.monitor import LogConfig
from ..exits import RESTARTS_FILE, restarts_in
from .append import GrowingFile
from .board import Board
from .console import Console, Summary


class MetricsLog:
    """One object a logged step, floats in full precision; a resumed run goes on after `step`, without overlap. A file
    that cannot be written is a warning, see `GrowingFile`.
    """

    def __init__(self, run: Path, config: LogConfig, step: int, steps: int) -> None:
        self.path, self.console, self.first_step = run / "metrics.jsonl", Console(step, steps), step
        with _no_more_than_a_warning():
            self._drop_after(step)
        self._file = GrowingFile(self.path)
        self._file.write(b"")  # it is there from the start
        self._board = Board(run / "tensorboard", step + 1) if config.tensorboard else None
        with _no_more_than_a_warning():
            self._tell_restarts(run, step)

    def write(self, scalars: dict[str, float], rows: dict[str, list[int]] | None = None) -> None:
        """`scalars` has "step", and whatever else was measured there; `rows`: ids of rows of the matrix, by what they
        are, which go under "rows", and as text into TensorBoard.
        """
        self._file.write(json.dumps(scalars | ({"rows": rows} if rows else {})).encode() + b"\n")
        self._show(scalars)
        for name, ids in (rows or {}).items():
            if self._board is not None:
                self._board.text(f"rows/{name}", ", ".join(map(str, ids)) or "none", int(scalars["step"]))

    @property
    def has_board(self) -> bool:
        """True if there is a TensorBoard, for pictures."""
        return self._board is not None

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Into TensorBoard, if there is one."""
        if self._board is not None:
            self._board.text(tag, markdown, step)

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """Into TensorBoard, where there is one: [height, width, 3] bytes."""
        if self._board is not None:
            self._board.image(tag, pixels, step)

    def complete(self, step: int, scalars: dict[str, float]) -> None:
        """Adds to the last line, that of `step`, what a stop kept from it."""
        with _no_more_than_a_warning():
            *before, last = self.path.read_bytes().splitlines(keepends=True) or [b""]
            if _step_of(last) != step:
                before, last = [*before, last], json.dumps({"step": step}).encode()
            with durable(self.path) as file:
                file.write(b"".join(before) + json.dumps(json.loads(last) | scalars).encode() + b"\n")
        self._show({"step": step, **scalars})

    def summary(self) -> Summary:
        """Best and last values of all logged steps, those of earlier starts included."""
        found = Summary()
        with _no_more_than_a_warning(), open(self.path, "rb") as file:
            for line in file:
                if _step_of(line) < float("inf"):
                    found.add(json.loads(line))
        return found

    def close(self) -> None:
        self.console.close()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _show(self, scalars: dict[str, float]) -> None:
        step = int(scalars["step"])
        if self._board is not None:
            self._board.scalars({_tag(name): value for name, value in scalars.items() if name != "step"}, step)
        self.console.logged(step, scalars)

    def _tell_restarts(self, run: Path, step: int) -> None:
        """All starts before this one, as one table: whoever opens TensorBoard sees why the run stood still."""
        if self._board is None or not (run / RESTARTS_FILE).exists():
            return
        rows = ["| start | ended | at step | how | then |", "| --: | --- | --: | --- | --- |"]
        for end in restarts_in(run):
            with suppress(ValueError, KeyError, TypeError):  # of an unknown form
                when = datetime.fromtimestamp(end["time"]).isoformat(" ", "seconds")
                how = f"{end['class']}, rank {end['rank']} on {end['host']}: {end['how']}"
                rows.append(f"| {end['attempt']} | {when} | {end['step']} | {how} | {end['decision']}: {end['why']} |")
        self._board.text("restarts", "\n".join(rows), step)

    def _drop_after(self, step: int) -> None:
        """Steps that a killed run logged after its last checkpoint are about to be done again."""
        if not self.path.exists():
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if _step_of(line) <= step]
        if kept == lines[: len(kept)]:
            os.truncate(self.path, sum(map(len, kept)))  # takes no room on the disk
        else:
            with durable(self.path) as file:
                file.write(b"".join(kept))


@contextmanager
def _no_more_than_a_warning() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        print(f"warning: {error}", file=sys.stderr, flush=True)


def _tag(name: str) -> str:
    """Tag of a scalar. One of a corpus keeps its title, as in val/loss/web; one of a bin of rows, its bin's."""
    head, slash, title = name.partition("/")
    group, _, rest = head.partition("_")
    return TAGS.get(head, f"{group}/{rest}" if group in GROUPS else head) + slash + title


def _step_of(line: bytes) -> float:
    """A line cut short by a kill counts as beyond every step."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")


GROUPS = ("tie", "grad", "rows", "embedding", "head")  # of tags that have none of their own: grad_cosine is grad/cosine
TAGS = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "lr": "train/lr",
    "tokens": "train/tokens",
    "tokens_per_s": "perf/tokens_per_s",
    "tokens_per_s_per_rank": "perf/tokens_per_s_per_rank",
    "step_s": "perf/step_s",
    "peak_memory_gib": "perf/peak_memory_gib",
    "mfu": "perf/mfu",
    "data_wait": "data/wait",
    "epochs": "data/epochs",
    "lookup_saved": "vocab/lookup_saved",
    "lookup_balance": "vocab/lookup_balance",
    "val_loss": "val/loss",
    "val_bits_per_byte": "val/bits_per_byte",
    "lens_commitment": "lens/commitment",
    "lens_preserved": "lens/preserved",
    "lens_seconds": "lens/seconds",
}
