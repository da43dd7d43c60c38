"""Whole matrices from the ranks' rows and back, for programs that keep their own checkpoints.

It stands apart from embedding.py because training needs none of it: the trainer's checkpoints stream rows
(pretrain/checkpoint).
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import all_gather
from .shard import VocabShard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Placement


def gather_matrix(rows_vD: Tensor, shard: VocabShard, group: dist.ProcessGroup | None) -> Tensor:
    """Returns a copy of the whole matrix [V, D] without padding, on every rank. One all-gather."""
    padded = rows_vD.new_zeros(shard.rows_per_rank, rows_vD.shape[1])  # the last shards may have fewer
    padded[: shard.rows] = rows_vD
    return all_gather(padded, group).flatten(0, 1)[: shard.vocab_size]


def scatter_matrix(matrix_VD: Tensor, rows_vD: Tensor, shard: VocabShard, name: str) -> None:
    """Copies this rank's rows of the whole matrix, with or without padding, to `rows_vD`. Local.

    Raises ValueError if the matrix has another shape.
    """
    whole = [(size, rows_vD.shape[1]) for size in (shard.vocab_size, shard.padded_size)]
    if tuple(matrix_VD.shape) not in whole:
        raise ValueError(f"{name} has shape {tuple(matrix_VD.shape)}, but the whole matrix has {whole[0]}")
    owned_vD = matrix_VD[shard.start : shard.start + shard.valid_rows]
    rows_vD[: shard.valid_rows].copy_(owned_vD)
    rows_vD[shard.valid_rows :].zero_()


def check_names(state: Mapping[str, Tensor], rows: Mapping[str, Tensor]) -> None:
    """Raises ValueError if the names differ."""
    if set(state) != set(rows):
        raise ValueError(
            f"the state has {', '.join(sorted(state)) or 'nothing'}, but this vocabulary needs {', '.join(rows)}"
            " (tied: embedding.weight alone; untied: head.weight too)"
        )


def rows_dtensor(
    rows_vD: Tensor, shard: VocabShard, mesh: "DeviceMesh", placements: "Sequence[Placement]"
) -> "DTensor":
    """Returns the matrix [padded_size, D] as a DTensor whose local part is `rows_vD`; they share memory.

    DTensor cuts a dim as VocabShard does: ceil(rows / ranks) each, the last shards shorter or empty.
    """
    from torch.distributed.tensor import DTensor

    shape = torch.Size((shard.padded_size, rows_vD.shape[1]))
    return DTensor.from_local(rows_vD, mesh, placements, run_check=False, shape=shape, stride=(shape[1], 1))
