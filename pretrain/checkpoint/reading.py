"""Builds a model for inference: no optimizer, no engine; the matrix sharded by rows."""

from collections.abc import Container
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..mesh import Mesh
from ..models.language_model import LanguageModel
from ..vocab import VocabConfig, VocabParallelEmbedding, VocabShard
from .state import matrix_dtensor


def model_for_reading(
    body: nn.Module,
    config: VocabConfig,
    rows: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    saved: Container[str] = (),
) -> tuple[LanguageModel, dict[str, Any]]:
    """Returns the model on the device, without weights, and the tensors to load, by their names in a checkpoint.

    body: made on the device "meta". The matrix is sharded over the ranks of the default process group; it is then a
    DTensor. Without a group it is a plain tensor. saved: tensor names in the checkpoint, which show if a tied matrix
    has become two.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    mesh = Mesh.of(world, device) if world > 1 else None
    vocab = VocabParallelEmbedding(
        config,
        VocabShard.of(mesh.vocab_rank if mesh else 0, world, rows, config.multiple),
        width,
        seed=0,
        group=mesh.vocab_group if mesh else None,
        compute_dtype=dtype,
        device=device,
        dtype=dtype,
    )
    vocab.match(saved)
    body.to(dtype).to_empty(device=device)
    tensors: dict[str, Any] = {name: parameter.detach() for name, parameter in body.named_parameters()}
    for name, rows_vD in vocab.named_rows().items():
        tensors[name] = matrix_dtensor(rows_vD.detach(), vocab.shard, mesh) if mesh else rows_vD.detach()
    return LanguageModel(vocab, body), tensors
