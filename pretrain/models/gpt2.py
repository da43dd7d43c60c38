"""GPT-2 as pure maths: the body between lookup and loss.

B sequences, T positions, D width, H heads. No torch.distributed: engines receive a body and return a callable.
Architecture and initial values: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, and
the code published with it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..families.gpt2 import GELUS, GPT2Config
from .attention import Mask, attention, within_documents
from .cache import NewTokens
from .initial import STD, initial_rows


class Body(nn.Module):
    """Positions, blocks, final norm: hidden [B, T, D] -> hidden [B, T, D].

    starts_BT: for each position, the first position of its document; attention and positions then stay within
    documents. None: each sequence is one document. cache: the tokens are new ones of sequences that it holds.
    """

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.stacked = {"attention.qkv.weight": (config.width,) * 3}
        self.positions = nn.Parameter(torch.empty(config.context, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, config.eps)

    def forward(self, hidden_BTD: Tensor, starts_BT: Tensor | None = None, cache: NewTokens | None = None) -> Tensor:
        length = hidden_BTD.shape[1]
        masks: list[Mask | None] = [None] * len(self.blocks)
        if cache is not None:
            hidden_BTD, masks = hidden_BTD + self.positions[cache.positions_BT], [*cache.blocks]
        elif starts_BT is None:
            hidden_BTD = hidden_BTD + self.positions[:length]
        else:
            hidden_BTD = hidden_BTD + self.positions[torch.arange(length, device=starts_BT.device) - starts_BT]
            masks = [within_documents(starts_BT)] * len(self.blocks)
        for block, mask in zip(self.blocks, masks, strict=True):
            hidden_BTD = block(hidden_BTD, mask)
        return self.norm(hidden_BTD)

    def initial_rows(self, name: str, seed: int, start: int, stop: int) -> Tensor:
        """Rows of a parameter's initial value, see `initial.initial_rows`. Positions have std 0.01."""
        std = 0.01 if name == "positions" else STD
        return initial_rows(self.get_parameter(name).shape, name, seed, start, stop, self.config.layers, std)


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, config.eps)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, config.eps)
        self.mlp = MLP(config)

    def forward(self, hidden_BTD: Tensor, mask: Mask | None = None) -> Tensor:
        hidden_BTD = hidden_BTD + self.attention(self.norm1(hidden_BTD), mask)
        return hidden_BTD + self.mlp(self.norm2(hidden_BTD))


class Attention(nn.Module):
    """Causal multi-head attention; with a mask, within documents."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, hidden_BTD: Tensor, mask: Mask | None = None) -> Tensor:
        queries, keys, values = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in self.qkv(hidden_BTD).chunk(3, dim=-1)
        )
        mixed_BHTd = attention(queries, keys, values, mask)
        return self.out(mixed_BHTd.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """D -> 4D -> D with GELU between."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)
        self.approximate = GELUS[config.gelu]

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(hidden_BTD), approximate=self.approximate))
