"""Activation checkpointing: a block keeps part of its activations and recomputes the rest in the backward."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

EXPENSIVE = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]


def checkpoint_activations(blocks: Iterable[nn.Module], kind: str) -> None:
    """Makes each block recompute activations in the backward instead of keeping them. Parameter names do not change.

    "block" keeps only the input of a block. "selective" also keeps the outputs of matmuls and attention, so that only
    cheap operations are repeated.
    """
    if kind == "none":
        return
    keep: dict[str, Any] = {}
    if kind == "selective":
        keep["context_fn"] = partial(create_selective_checkpoint_contexts, EXPENSIVE)
    for block in blocks:
        block.forward = partial(
            checkpoint,
            block.forward,
            use_reentrant=False,
            preserve_rng_state=False,  # no block draws random numbers
            **keep,
        )
