"""Causal attention, over a whole sequence or within each document of a sequence.

B sequences, T positions, H query heads of size d, K key/value heads. K may be smaller than H: then H / K consecutive
query heads share one (GQA; Ainslie et al., arXiv:2305.13245). With separate documents, a mask is built once per forward
and shared by all blocks. On a GPU it is a block mask of FlexAttention (Dong et al., arXiv:2412.05496), which skips
masked blocks; on a CPU it is a boolean mask.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from .cache import NewOfBlock

Mask = Tensor | BlockMask | NewOfBlock


def within_documents(starts_BT: Tensor) -> Mask:
    """Mask: each position attends to itself and to earlier positions of its document.

    starts_BT: for each position, the first position of its document.
    """
    if starts_BT.is_cuda:
        return block_mask(starts_BT)
    position_T = torch.arange(starts_BT.shape[1])
    return ((position_T[:, None] >= position_T) & (position_T >= starts_BT[..., None]))[:, None]


def block_mask(starts_BT: Tensor) -> BlockMask:
    """The same mask for FlexAttention."""

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (key >= starts_BT[b, query])

    batch, length = starts_BT.shape
    # uncompiled, it makes several boolean masks [B, 1, T, T]
    create = _compiled(create_block_mask) if starts_BT.is_cuda else create_block_mask
    return create(sees, batch, None, length, length, device=starts_BT.device)


def attention(queries_BHTd: Tensor, keys_BKTd: Tensor, values_BKTd: Tensor, mask: Mask | None) -> Tensor:
    """Returns softmax(q·kᵀ/√d)·v, [B, H, T, d]. mask None: causal; new tokens of a cache: with what it holds, too."""
    causal = mask is None
    if isinstance(mask, NewOfBlock):
        keys_BKTd, values_BKTd = mask.extended(keys_BKTd, values_BKTd)
        causal, mask = mask.filled == 0, mask.seen_B11C
    shared = keys_BKTd.shape[1] != queries_BHTd.shape[1]
    if isinstance(mask, BlockMask):
        # uncompiled, it computes the whole matrix of scores
        flex: Any = _compiled(flex_attention) if queries_BHTd.is_cuda else flex_attention
        return flex(queries_BHTd, keys_BKTd, values_BKTd, block_mask=mask, enable_gqa=shared)
    return F.scaled_dot_product_attention(
        queries_BHTd, keys_BKTd, values_BKTd, attn_mask=mask, is_causal=causal, enable_gqa=shared
    )


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)
