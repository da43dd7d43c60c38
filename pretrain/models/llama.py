"""The Llama family as pure maths: RMS norms, rotary positions, SwiGLU, grouped-query attention.

B sequences, T positions, D width, H query heads and K key/value heads of size d, F inner width of the MLP.
Architecture: Touvron et al., arXiv:2302.13971; Grattafiori et al., arXiv:2407.21783; with the biases of Qwen2
(arXiv:2407.10671) and the query and key norms of Qwen3 (arXiv:2505.09388) as options.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..families.llama import LlamaConfig
from .attention import Mask, attention, within_documents
from .cache import NewTokens
from .initial import initial_rows


@dataclass(frozen=True)
class RotaryTables:
    """Rotary tables of a batch, shared by all blocks: cosines and sines [T, d] or [B, 1, T, d] in fp32, and a mask.

    Not a tuple: FSDP2 casts tensors inside tuples to the compute dtype, and bf16 cannot distinguish large positions.
    """

    cosines: Tensor
    sines: Tensor
    mask: Mask | None

    def turn(self, x_BHTd: Tensor) -> Tensor:
        """Rotates each pair (i, i + d/2) of dims by the angle of its position. Su et al., arXiv:2104.09864."""
        first, second = x_BHTd.chunk(2, dim=-1)
        return (x_BHTd * self.cosines + torch.cat((-second, first), dim=-1) * self.sines).to(x_BHTd.dtype)


class Body(nn.Module):
    """Blocks and final norm: hidden [B, T, D] -> hidden [B, T, D].

    starts_BT: for each position, the first position of its document; attention and positions then stay within
    documents. None: each sequence is one document. cache: the tokens are new ones of sequences that it holds.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        keys = config.kv_heads * config.size
        self.stacked = {"attention.qkv.weight": (config.heads * config.size, keys, keys)}
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.eps)

    def forward(self, hidden_BTD: Tensor, starts_BT: Tensor | None = None, cache: NewTokens | None = None) -> Tensor:
        tables_of_blocks = [self.tables(hidden_BTD, starts_BT, cache)] * len(self.blocks)
        if cache is not None:
            tables_of_blocks = [
                replace(tables, mask=new) for tables, new in zip(tables_of_blocks, cache.blocks, strict=True)
            ]
        for block, tables in zip(self.blocks, tables_of_blocks, strict=True):
            hidden_BTD = block(hidden_BTD, tables)
        return self.norm(hidden_BTD)

    def tables(self, hidden_BTD: Tensor, starts_BT: Tensor | None, cache: NewTokens | None = None) -> RotaryTables:
        """Computes the tables, again per forward: a buffer would be cast and emptied together with the weights."""
        positions = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)
        mask = None
        if cache is not None:
            positions = cache.positions_BT.unsqueeze(1)
        elif starts_BT is not None:
            positions, mask = (positions - starts_BT).unsqueeze(1), within_documents(starts_BT)
        angles = positions.float().unsqueeze(-1) * frequencies(self.config, hidden_BTD.device)
        angles = torch.cat((angles, angles), dim=-1)
        return RotaryTables(angles.cos(), angles.sin(), mask)

    def initial_rows(self, name: str, seed: int, start: int, stop: int) -> Tensor:
        """Rows of a parameter's initial value, see `initial.initial_rows`."""
        return initial_rows(self.get_parameter(name).shape, name, seed, start, stop, self.config.layers)


def frequencies(config: LlamaConfig, device: torch.device) -> Tensor:
    """Angle from one position to the next, per pair of dims: [d/2], fp32."""
    exponents = torch.arange(0, config.size, 2, dtype=torch.float32, device=device) / config.size
    plain = 1.0 / config.rope_theta**exponents
    if config.rope_factor == 1:
        return plain
    turns = config.rope_original / (2 * math.pi / plain)
    kept = ((turns - config.rope_low) / (config.rope_high - config.rope_low)).clamp(0, 1)
    return (1 - kept) * plain / config.rope_factor + kept * plain


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.width, config.eps)
        self.attention = Attention(config)
        self.norm2 = RMSNorm(config.width, config.eps)
        self.mlp = MLP(config)

    def forward(self, hidden_BTD: Tensor, tables: RotaryTables) -> Tensor:
        hidden_BTD = hidden_BTD + self.attention(self.norm1(hidden_BTD), tables)
        return hidden_BTD + self.mlp(self.norm2(hidden_BTD))


class Attention(nn.Module):
    """Causal attention of H query heads; H / K consecutive query heads share one key/value head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.size, self.heads = config.size, (config.heads, config.kv_heads, config.kv_heads)
        self.qkv = nn.Linear(config.width, sum(self.heads) * config.size, bias=config.bias != "none")
        self.out = nn.Linear(config.heads * config.size, config.width, bias=config.bias == "attention")
        self.query_norm = RMSNorm(config.size, config.eps) if config.qk_norm else nn.Identity()
        self.key_norm = RMSNorm(config.size, config.eps) if config.qk_norm else nn.Identity()

    def forward(self, hidden_BTD: Tensor, tables: RotaryTables) -> Tensor:
        heads_BTHd = self.qkv(hidden_BTD).unflatten(-1, (-1, self.size))
        queries, keys, values = heads_BTHd.split(self.heads, dim=2)
        queries, keys = self.query_norm(queries), self.key_norm(keys)
        queries, keys, values = (x.transpose(1, 2) for x in (queries, keys, values))
        mixed_BHTd = attention(tables.turn(queries), tables.turn(keys), values, tables.mask)
        return self.out(mixed_BHTd.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """D -> F -> D with a SwiGLU gate. Shazeer, arXiv:2002.05202."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.inner, bias=False)
        self.up = nn.Linear(config.width, config.inner, bias=False)
        self.down = nn.Linear(config.inner, config.width, bias=False)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(hidden_BTD)) * self.up(hidden_BTD))


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x²) + eps) · weight, in the dtype of x. Zhang & Sennrich, arXiv:1910.07467.

    Under autocast the weight is fp32; without the cast the output would be fp32 too, wider than the residual stream.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
