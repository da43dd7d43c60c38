"""TensorBoard's event files, written in the calling thread: an error in SummaryWriter's own thread cannot be caught.

They lie in the run's folder itself, because TensorBoard names a run by the folder of its event files.
"""

import io
import itertools
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from data_prep.durable import DurableFile, durable

from .append import GrowingFile

SETTINGS_FILE = "events.out.tfevents.0000000000.settings"  # sorted first, so that it is read first

_count = itertools.count()  # of the event files of this process: two in one second need two names


class Board:
    """Curves, texts and pictures for TensorBoard, in the folder of a run. A file that cannot be written ends nothing.

    first_step: TensorBoard drops the points of earlier files from that step on.
    """

    def __init__(self, run: Path, first_step: int) -> None:
        self._first_step = first_step
        begun, host = int(time.time()), socket.gethostname()
        name = f"events.out.tfevents.{begun:010d}.{host}.{os.getpid()}.{next(_count):04d}"  # read in the order of names
        self._file = GrowingFile(run / name, self._header)
        self._file.write(b"")

    def scalars(self, values: dict[str, float], step: int) -> None:
        self._add(*(Event(step=step, summary=summary.scalar(tag, value)) for tag, value in values.items()))

    def text(self, tag: str, text: str, step: int) -> None:
        self._add(Event(step=step, summary=text_summary(tag, text)))

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """[height, width, 3] bytes."""
        self._add(Event(step=step, summary=summary.image(tag, pixels, dataformats="HWC")))

    def summary(self, value: Summary, step: int) -> None:
        self._add(Event(step=step, summary=value))

    def close(self) -> None:
        self._file.close()

    def _header(self) -> bytes:
        session = SessionLog(status=SessionLog.START)
        return records(Event(file_version="brain.Event:2"), Event(step=self._first_step, session_log=session))

    def _add(self, *events: Event) -> None:
        self._file.write(records(*events))


def text_summary(tag: str, markdown: str) -> Summary:
    """A text as TensorBoard reads it."""
    return summary.text(tag, markdown)


def replace_settings(run: Path, summaries: Iterable[Summary]) -> None:
    """Writes the file of what belongs to the latest start: TensorBoard keeps the first of several such summaries."""
    events = [Event(file_version="brain.Event:2"), *(Event(summary=value) for value in summaries)]
    with whole(run / SETTINGS_FILE) as file:
        file.write(records(*events))


@contextmanager
def whole(path: Path) -> Iterator[DurableFile]:
    """Writes an event file so that TensorBoard sees all of it or nothing: it reads each file with `tfevents` in its
    name, so a temporary name must not have that.
    """
    waiting = path.with_name("board.part")
    with durable(waiting) as file:
        yield file
    waiting.replace(path)


def records(*events: Event) -> bytes:
    """Events as they stand in a file. An event without a time gets the present one."""
    buffer, now = io.BytesIO(), time.time()
    writer = RecordWriter(buffer)
    for event in events:
        event.wall_time = event.wall_time or now
        writer.write(event.SerializeToString())
    return buffer.getvalue()
