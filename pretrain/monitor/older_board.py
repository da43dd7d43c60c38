"""Event files of earlier versions, which lie in RUN/tensorboard and have other tags."""

import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from .board import records, whole
from .scalars import ABOUT, BY_KEY, map_tag, tag_of

FOLDER = "tensorboard"
KEYS = {  # of old tags that do not follow from the key
    "train/loss": "loss",
    "train/grad_norm": "grad_norm",
    "train/lr": "lr",
    "train/tokens": "tokens",
    "train/tokens_per_s": "tokens_per_s",
    "data/wait": "data_wait",
    "data/epochs": "epochs",
    "vocab/lookup_saved": "lookup_saved",
    "vocab/lookup_balance": "lookup_balance",
    "val/loss": "val_loss",
    "val/bits_per_byte": "val_bits_per_byte",
}


def move_older(run: Path) -> None:
    """Rewrites the files of RUN/tensorboard to RUN with today's tags, so that each curve goes on, and removes them.

    Points keep their times, texts and pictures stay. A file that is cut short is kept up to there. A damaged one stays
    where it is: raises OSError, after the others are moved.
    """
    damaged = None
    for path in sorted((run / FOLDER).glob("*tfevents*")):
        try:
            _move(path, run)
        except (DecodeError, ValueError) as error:
            damaged = OSError(f"{path} is damaged, and stays as it is: {error}")
    with suppress(OSError):
        (run / FOLDER).rmdir()  # unless something else lies there
    if damaged is not None:
        raise damaged


def _move(path: Path, run: Path) -> None:
    with whole(run / path.name) as file:
        for event in events_in(path):
            for value in event.summary.value:
                value.tag = new_tag(value.tag, value.HasField("image"))
            file.write(records(event))
    path.unlink()


def new_tag(old: str, image: bool = False) -> str:
    """Returns today's tag of an old one. Those of your own hooks stay."""
    if old.partition("/")[0] in ("restarts", "settings changed"):
        return f"{ABOUT}/{old}"
    group, _, rest = old.partition("/")
    if image and group == "lens":
        return map_tag(rest)
    name = "/".join(old.split("/")[:2])
    if name in KEYS:
        return tag_of(KEYS[name] + old.removeprefix(name))
    key = old if group in BY_KEY else f"{group}_{rest}"
    return tag_of(key) if key.partition("/")[0] in BY_KEY else old


def events_in(path: Path) -> Iterator[Event]:
    """The events of a file, up to its end or to a record that is cut short. Raises ValueError or DecodeError if a
    record is damaged.
    """
    with open(path, "rb") as file:
        while len(head := file.read(12)) == 12:  # the length, and its checksum
            length, checksum = struct.unpack("<QI", head)
            if masked_crc32c(head[:8]) != checksum:
                raise ValueError("the checksum of a record's length does not match")
            record = file.read(length + 4)  # the event, and its checksum
            if len(record) < length + 4:
                return
            yield Event.FromString(record[:length])
