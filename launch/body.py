"""What a block keeps of its activations. A formula stands here once. i: bytes of a number of the compute dtype."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pretrain.config.job import JobConfig


@dataclass(frozen=True)
class Activations:
    """Numbers a token of one block. kept: what its backward finds; again: what it makes again; gradients: those of
    activations that it holds at most; sums: in fp32, of the softmax. attention: the width of all heads.
    """

    kept: int
    again: int
    gradients: int
    sums: int
    attention: int
    formula: str

    @classmethod
    def of(cls, config: JobConfig) -> "Activations":
        return FAMILIES[config.model.family](config.model, config.engine.activation_checkpointing)


def _of_gpt2(model: Any, kind: str) -> Activations:
    kept, again = {
        "none": (16, 0),  # inputs of two norms (1, 1) and of four projections (1, 1, 1, 4), qkv (3), GELU's input (4)
        "block": (1, 15),  # its input alone
        "selective": (11, 7),  # its input, and what matmuls (3, 1, 4, 1) and attention (1) have made
    }[kind]
    D, heads = model.width, model.heads
    gradients = 5 * D  # of its output and of GELU's
    formula = f"a block: N · (D · i · {kept} + 4 · heads)"
    return Activations(kept * D, again * D, gradients, heads * (kind != "block"), D, formula)


def _of_llama(model: Any, kind: str) -> Activations:
    """As on a GPU, where a norm keeps its input alone."""
    D, F, queries, keys = model.width, model.inner, model.heads * model.size, model.kv_heads * model.size
    qkv, turned = queries + 2 * keys, queries + keys
    everything = 4 * D + qkv + turned + queries + 4 * F  # as above, and queries and keys once more; four of the MLP
    kept, again, formula = {
        "none": (everything, 0, "4 · D + 3 · (queries + keys) + 4 · F"),
        "block": (D, everything - D, "D"),
        "selective": (
            3 * D + qkv + queries + 2 * F,
            3 * D + turned + 2 * F,
            "3 · D + 2 · (queries + keys) + 2 · F",
        ),
    }[kind]
    sums = model.heads + (model.heads + model.kv_heads) * model.qk_norm
    formula = f"a block: N · (i · ({formula}) + 4 · heads)"
    return Activations(kept, again, D + 2 * F, sums * (kind != "block"), queries, formula)


FAMILIES: dict[str, Callable[[Any, str], Activations]] = {"gpt2": _of_gpt2, "llama": _of_llama}
