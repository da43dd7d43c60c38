"""The Llama family as pure maths: RMS norms, rotary positions, SwiGLU, queries that share keys and values.

B sequences, T positions, D width, H heads of d for queries, K of d for keys and values, F the MLP's inner width.
Architecture: Touvron et al., arXiv:2302.13971; Grattafiori et al., arXiv:2407.21783; with the biases of Qwen2
(arXiv:2407.10671) and the norms of Qwen3 (arXiv:2505.09388) where they are asked for.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..vocab.shard import seeded_normal
from .attention import Mask, attention, within_documents


@dataclass
class LlamaConfig:
    """layers: blocks; width: D; heads: H; kv_heads: K, which H is a multiple of; head_size: d, null: D / H; inner: F.

    context: the most positions it can see. eps: of the norms. rope_theta: base of the rotary frequencies. rope_factor:
    how many times slower the slow ones turn than they did in a context of rope_original positions, where 1 changes
    none: those of fewer than rope_low turns in it are slow, those of more than rope_high stay as they are (Llama 3.1).
    qk_norm: queries and keys are normed, each head on its own (Qwen3). bias: none; qkv (Qwen2); or attention, which
    has one after its output as well.
    """

    family: str = "llama"
    layers: int = 16
    width: int = 2048
    heads: int = 32
    kv_heads: int = 8
    head_size: int | None = None
    inner: int = 8192
    context: int = 8192
    eps: float = 1e-5
    rope_theta: float = 500_000.0
    rope_factor: float = 1.0
    rope_low: float = 1.0
    rope_high: float = 4.0
    rope_original: int = 8192
    qk_norm: bool = False
    bias: str = "none"

    def __post_init__(self) -> None:
        for key in ("layers", "width", "heads", "kv_heads", "inner", "context", "rope_original"):
            if getattr(self, key) < 1:
                raise ValueError(f"model.{key}={getattr(self, key)} must be at least 1")
        for key in ("eps", "rope_theta", "rope_factor", "rope_low", "rope_high"):
            if not 0 < getattr(self, key) < math.inf:
                raise ValueError(f"model.{key}={getattr(self, key)} must be positive")
        if self.rope_low >= self.rope_high:
            raise ValueError(f"model.rope_low={self.rope_low} must be below model.rope_high={self.rope_high}")
        if self.heads % self.kv_heads:
            raise ValueError(f"model.kv_heads={self.kv_heads} must divide model.heads={self.heads}")
        if self.head_size is None and self.width % self.heads:
            raise ValueError(f"model.heads={self.heads} must divide model.width={self.width}, or give model.head_size")
        if self.size < 2 or self.size % 2:
            raise ValueError(f"model.head_size={self.size} must be even: its dims turn in pairs")
        if self.bias not in ("none", "qkv", "attention"):
            raise ValueError(f"model.bias={self.bias} must be none, qkv or attention")

    @property
    def size(self) -> int:
        """d."""
        return self.head_size if self.head_size is not None else self.width // self.heads

    def body(self) -> "Body":
        return Body(self)


@dataclass(frozen=True)
class RotaryTables:
    """Where the tokens of a batch stand, for all blocks: cosines and sines [T, d] or [B, 1, T, d] in fp32, and a mask.

    Not a tuple: FSDP2 casts the tensors in those that it hands to a block, and bf16 cannot tell far positions apart.
    """

    cosines: Tensor
    sines: Tensor
    mask: Mask | None

    def turn(self, x_BHTd: Tensor) -> Tensor:
        """Rotates each pair (i, i + d/2) of dims by its position's angle. Su et al., arXiv:2104.09864."""
        first, second = x_BHTd.chunk(2, dim=-1)
        return (x_BHTd * self.cosines + torch.cat((-second, first), dim=-1) * self.sines).to(x_BHTd.dtype)


class Body(nn.Module):
    """Blocks and final norm: hidden [B, T, D] -> hidden [B, T, D].

    `starts_BT`: the position at which the document of each position begins. Attention and positions then keep to
    documents; None: a sequence is one.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.eps)

    def forward(self, hidden_BTD: Tensor, starts_BT: Tensor | None = None) -> Tensor:
        tables = self.tables(hidden_BTD, starts_BT)
        for block in self.blocks:
            hidden_BTD = block(hidden_BTD, tables)
        return self.norm(hidden_BTD)

    def tables(self, hidden_BTD: Tensor, starts_BT: Tensor | None) -> RotaryTables:
        """Nothing is kept between calls: a buffer would be cast, and left empty, with the weights."""
        positions = torch.arange(hidden_BTD.shape[1], device=hidden_BTD.device)
        mask = None
        if starts_BT is not None:
            positions, mask = (positions - starts_BT).unsqueeze(1), within_documents(starts_BT)
        angles = positions.float().unsqueeze(-1) * frequencies(self.config, hidden_BTD.device)
        angles = torch.cat((angles, angles), dim=-1)
        return RotaryTables(angles.cos(), angles.sin(), mask)

    def initial_rows(self, name: str, seed: int, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the parameter's initial value, fp32, on the CPU; the same for any split.

        Weights are normal with std 0.02; the two projections that write to the residual stream are scaled by
        1/sqrt(2 L), so that its variance does not grow with depth. Biases 0, norm scales 1.
        """
        shape = self.get_parameter(name).shape
        if name.endswith("bias"):
            return torch.zeros(stop - start)
        if len(shape) == 1:
            return torch.ones(stop - start)
        std = 0.02
        if name.endswith((".attention.out.weight", ".mlp.down.weight")):
            std /= math.sqrt(2 * self.config.layers)
        return seeded_normal(name, seed, start, stop, shape[1], std)


def frequencies(config: LlamaConfig, device: torch.device) -> Tensor:
    """Angle from one position to the next, of each pair of dims: [d/2], fp32."""
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
    """Causal attention of H heads, H / K of them to one head of keys and values."""

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
    """D -> F -> D, gated: SwiGLU. Shazeer, arXiv:2002.05202."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.inner, bias=False)
        self.up = nn.Linear(config.width, config.inner, bias=False)
        self.down = nn.Linear(config.inner, config.width, bias=False)

    def forward(self, hidden_BTD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(hidden_BTD)) * self.up(hidden_BTD))


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x²) + eps) · weight. Zhang & Sennrich, arXiv:1910.07467.

    In the dtype of x: under autocast the weight has another, and the product would be wider than what it is added to.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
