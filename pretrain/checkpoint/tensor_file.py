"""Writes one rank's file of a checkpoint: safetensors, in the layout of torch.distributed.checkpoint.

torch's own writer is not used: it holds the whole file in memory twice and needs collectives. This writer streams,
works without other ranks, and computes the hash while it writes. torch reads the file.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.durable import durable

PIECE_BYTES = 8 << 20  # written, then hashed while still in the CPU cache
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Slice:
    """Part of a tensor on one rank. offsets: its first index per dim."""

    name: str
    tensor: Tensor
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class Streamed:
    """Tensor that is never whole in memory: `pieces` yields its rows in order while they are written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def file_name(rank: int) -> str:
    return f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors"


def write_slices(path: Path, slices: list[Slice]) -> dict[str, Any]:
    """Writes slices as `write_streamed` does, with their offsets in the metadata."""
    offsets = {part.name: {"saved_offsets": part.offsets} for part in slices}
    streamed = [
        Streamed(part.name, part.tensor.dtype, tuple(part.tensor.shape), partial(iter, (part.tensor,)))
        for part in slices
    ]
    return write_streamed(path, streamed, {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0"})


def write_streamed(
    path: Path,
    tensors: list[Streamed],
    metadata: dict[str, str],
    over: Callable[[list[Streamed]], Iterable[Streamed]] = iter,
) -> dict[str, Any]:
    """Writes the file atomically, synced to the disk. Returns its size and hash. Raises OSError if the disk is full.

    Pieces on a device are copied to the host one at a time.
    """
    header: dict[str, Any] = {"__metadata__": metadata | {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.bytes
        header[tensor.name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with durable(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in over(tensors):
            written = 0
            for piece in tensor.pieces():
                data = piece.to(tensor.dtype).contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data
                for start in range(0, len(data), PIECE_BYTES):
                    file.write(data[start : start + PIECE_BYTES])
                written += len(data)
            assert written == tensor.bytes, f"{tensor.name}: {written} bytes in pieces, {tensor.bytes} by its shape"
    return {"bytes": 8 + len(text) + end, "sha256": file.sha256}
