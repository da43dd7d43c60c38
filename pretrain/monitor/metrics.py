"""Metrics of a run: scalars in `RUN/metrics.jsonl`, in TensorBoard, and on the terminal; its restarts. Rank 0 only."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.durable import durable

from ..config.monitor import LogConfig
from ..exits import RESTARTS_FILE, restarts_in
from .append import GrowingFile
from .board import Board, replace_settings, text_summary
from .charts import Charts
from .console import Console, Summary
from .followers import Followers
from .hparams import session, table
from .older_board import move_older
from .scalars import ABOUT, BEST, tag_of
from .tokens import TokenTexts


class MetricsLog:
    """Writes one object per logged step, floats in full precision. A resumed run continues after `step`, without
    overlap. A file that cannot be written is only a warning, see `GrowingFile`.
    """

    def __init__(self, run: Path, config: LogConfig, step: int, steps: int) -> None:
        self._run, self._config, self.path = run, config, run / "metrics.jsonl"
        self.console, self.first_step = Console(step, steps), step
        self._tokens = TokenTexts(None)
        self._open(step)
        self._followers = Followers(run, config)

    def _open(self, step: int) -> None:
        """Opens the files, to write what comes after `step`."""
        with _no_more_than_a_warning():
            self._drop_after(step)
        self._file = GrowingFile(self.path)
        self._file.write(b"")  # so that the file exists from the start
        self._board: Board | None = None
        if self._config.tensorboard:
            with _no_more_than_a_warning():
                move_older(self._run)
            self._board = Board(self._run, step + 1)
        self._charts, self._best, self._listed = Charts(()), dict[str, float](), set[str]()
        self._read_back()
        with _no_more_than_a_warning():
            self._tell_restarts(self._run, step)

    def rewind(self, step: int) -> None:
        """Continues after an earlier step, without what was logged after it."""
        self._close_files()
        self._open(step)
        self.console.rewind(step)

    def named(self, row: int) -> str:
        """Text and id of a row's token."""
        return self._tokens.named(row)

    def describe(self, settings: dict[str, Any], tokenizer: Path | None) -> None:
        """Shows all settings in TensorBoard: as a table, and for its comparison of runs. `tokenizer`: names the tokens
        in lists of rows.
        """
        self._tokens = TokenTexts(tokenizer)
        if self._board is not None:
            with _no_more_than_a_warning():
                replace_settings(self._run, [text_summary(f"{ABOUT}/settings", table(settings)), *session(settings)])

    def write(self, scalars: dict[str, float], rows: dict[str, list[int]] | None = None) -> None:
        """Logs one step. `scalars` has "step" and everything that was measured there. `rows`: ids of rows of the
        matrix by what they are; they go under "rows" into the file, and as text with their tokens into TensorBoard.
        """
        self._file.write(json.dumps(scalars | ({"rows": rows} if rows else {})).encode() + b"\n")
        self._followers.look()
        self._show(scalars)
        for name, ids in (rows or {}).items():
            self._list(name, ids, scalars)

    @property
    def has_board(self) -> bool:
        """True if there is a TensorBoard, for pictures."""
        return self._board is not None

    def tell(self, title: str, markdown: str, step: int) -> None:
        """Writes a text about the run into TensorBoard, if there is one."""
        if self._board is not None:
            self._board.text(f"{ABOUT}/{title}", markdown, step)

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """Writes into TensorBoard, if there is one. pixels: [height, width, 3] bytes."""
        if self._board is not None:
            self._board.image(tag, pixels, step)

    def complete(self, step: int, scalars: dict[str, float]) -> None:
        """Adds scalars to the last line, that of `step`, if a stop came before they were measured."""
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
        self._close_files()
        self._followers.close()

    def _close_files(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _show(self, scalars: dict[str, float]) -> None:
        step = int(scalars["step"])
        if self._board is not None:
            self._plot(self._board, {key: value for key, value in scalars.items() if key != "step"}, step)
        self.console.logged(step, scalars)

    def _plot(self, board: Board, scalars: dict[str, float], step: int) -> None:
        points = {tag_of(key): value for key, value in scalars.items()}
        for key, tag in BEST.items():
            if key in scalars:
                self._best[key] = points[tag] = min(self._best.get(key, scalars[key]), scalars[key])
        board.scalars(points, step)
        self._charts.add(scalars)
        if self._charts.changed:
            board.summary(self._charts.summary(), step)

    def _list(self, name: str, ids: list[int], scalars: dict[str, float]) -> None:
        """Shows rows as text in TensorBoard. An empty list is shown only if the one before had rows."""
        if self._board is None or not (ids or name in self._listed):
            return
        (self._listed.add if ids else self._listed.discard)(name)
        count = max(int(scalars.get(name, 0)), len(ids))
        some = f", the first {len(ids)} by id" if count > len(ids) else ""
        rows = ", ".join(self._tokens.named(row) for row in ids)
        self._board.text(f"rows/{name}", f"{count:,} rows{some}: {rows}" if ids else "none", int(scalars["step"]))

    def _read_back(self) -> None:
        """Takes from the steps that are kept which charts there are, what was best, and which rows were listed."""
        with suppress(OSError):
            for line in self.path.read_bytes().splitlines(keepends=True):
                if _step_of(line) < float("inf"):
                    scalars = json.loads(line)
                    self._charts.add(scalars)
                    for key in BEST.keys() & scalars.keys():
                        self._best[key] = min(self._best.get(key, scalars[key]), scalars[key])
                    for name, ids in scalars.get("rows", {}).items():
                        (self._listed.add if ids else self._listed.discard)(name)

    def _tell_restarts(self, run: Path, step: int) -> None:
        """Shows all starts before this one as one table: TensorBoard then says why the run stood still."""
        if self._board is None or not (run / RESTARTS_FILE).exists():
            return
        rows = ["| start | ended | at step | how | then |", "| --: | --- | --: | --- | --- |"]
        for end in restarts_in(run):
            with suppress(ValueError, KeyError, TypeError):  # lines of an unknown form
                when = datetime.fromtimestamp(end["time"]).isoformat(" ", "seconds")
                how = f"{end['class']}, rank {end['rank']} on {end['host']}: {end['how']}"
                rows.append(f"| {end['attempt']} | {when} | {end['step']} | {how} | {end['decision']}: {end['why']} |")
        self._board.text(f"{ABOUT}/restarts", "\n".join(rows), step)

    def _drop_after(self, step: int) -> None:
        """Drops steps that a killed run logged after its last checkpoint: they will be done again."""
        if not self.path.exists():
            return
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if _step_of(line) <= step]
        if kept == lines[: len(kept)]:
            os.truncate(self.path, sum(map(len, kept)))  # needs no space on the disk
        else:
            with durable(self.path) as file:
                file.write(b"".join(kept))


@contextmanager
def _no_more_than_a_warning() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        print(f"warning: {error}", file=sys.stderr, flush=True)


def _step_of(line: bytes) -> float:
    """Returns the step of a line; infinity if a kill has cut the line short."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")
