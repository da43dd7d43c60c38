"""Averages the weights of checkpoints by rows. Not part of rows.py, which knows one checkpoint."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ..interop.folder import EMBEDDING, OUTPUT, pieces
from ..optim import STATE_PREFIX
from .folder import step_of
from .rows import CheckpointRows
from .state import HOOK_PREFIXES
from .tensor_file import Streamed

PARTS = 16  # an average has float64 sums and several checkpoints' rows: its pieces are smaller by this factor


def averaged(found: Sequence[CheckpointRows], factors: Sequence[float]) -> list[Streamed]:
    """Returns the tensors Σ factor · weight / Σ factor over the checkpoints, read while they are written.

    The sum is in float64, and is rounded once, to fp32. A checkpoint from before a split of the matrix counts with its
    one matrix for both. Raises ValueError if names or shapes differ otherwise.
    """
    shapes = [_weights(checkpoint) for checkpoint in found]
    untied = any(OUTPUT in one for one in shapes)
    if untied:
        shapes = [{OUTPUT: one.get(EMBEDDING, []), **one} for one in shapes]
    for checkpoint, one in zip(found, shapes, strict=True):
        _check_same(checkpoint, one, found[0], shapes[0])
    return [
        Streamed(name, torch.float32, tuple(shape), partial(_read, name, tuple(shape), found, factors))
        for name, shape in sorted(shapes[0].items())
    ]


def _weights(checkpoint: CheckpointRows) -> dict[str, list[int]]:
    others = (STATE_PREFIX, *HOOK_PREFIXES)
    return {name: shape for name, shape in checkpoint.shapes.items() if not name.startswith(others)}


def _check_same(one: CheckpointRows, shapes: dict[str, list[int]], other: CheckpointRows, theirs: object) -> None:
    assert isinstance(theirs, dict)
    for name in sorted(shapes.keys() | theirs.keys()):
        if shapes.get(name) != theirs.get(name):
            said = [
                f"step {step_of(checkpoint.folder)} has {name} {given.get(name, 'not at all')}"
                for checkpoint, given in ((other, theirs), (one, shapes))
            ]
            raise ValueError(f"steps= must choose checkpoints of one model: {said[0]}, {said[1]}")


def _read(
    name: str, shape: tuple[int, ...], found: Sequence[CheckpointRows], factors: Sequence[float]
) -> Iterator[Tensor]:
    row_bytes = torch.empty(shape[1:], device="meta").nbytes
    for low, high in pieces(0, shape[0], PARTS * row_bytes):
        total = torch.zeros(high - low, *shape[1:], dtype=torch.float64)
        for checkpoint, factor in zip(found, factors, strict=True):
            source = name if name in checkpoint.shapes else EMBEDDING
            total.add_(checkpoint.rows(source, low, high), alpha=factor)
        yield total.div_(sum(factors))
