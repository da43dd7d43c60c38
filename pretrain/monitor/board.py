"""TensorBoard's event file, written in the calling thread: an error in SummaryWriter's own thread cannot be caught."""

import io
import itertools
import os
import socket
import time
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import summary

from .append import GrowingFile

_count = itertools.count()  # of the event files of this process: two in one second need two names


class Board:
    """Curves, texts and pictures in a folder of TensorBoard. A file that cannot be written ends nothing.

    first_step: points of earlier files from that step on are not shown.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        self._first_step = first_step
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_count)}"
        self._file = GrowingFile(folder / name, self._header)
        self._file.write(b"")

    def scalars(self, values: dict[str, float], step: int) -> None:
        self._add(*(Event(step=step, summary=summary.scalar(tag, value)) for tag, value in values.items()))

    def text(self, tag: str, text: str, step: int) -> None:
        self._add(Event(step=step, summary=summary.text(tag, text)))

    def image(self, tag: str, pixels: np.ndarray, step: int) -> None:
        """[height, width, 3] bytes."""
        self._add(Event(step=step, summary=summary.image(tag, pixels, dataformats="HWC")))

    def close(self) -> None:
        self._file.close()

    def _header(self) -> bytes:
        session = SessionLog(status=SessionLog.START)
        return _records(Event(file_version="brain.Event:2"), Event(step=self._first_step, session_log=session))

    def _add(self, *events: Event) -> None:
        self._file.write(_records(*events))


def _records(*events: Event) -> bytes:
    buffer, now = io.BytesIO(), time.time()
    writer = RecordWriter(buffer)
    for event in events:
        event.wall_time = now
        writer.write(event.SerializeToString())
    return buffer.getvalue()
