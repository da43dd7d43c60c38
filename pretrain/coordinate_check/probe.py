"""Measures the activations of a model on one text. Separate from points.py because it needs torch.

B sequences of T positions, N = B·T, D width, v rows of the matrix on this rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..mesh import Mesh
from ..models.language_model import LanguageModel
from ..vocab.readout import logits_in
from .points import LOGITS, Point


class Probe:
    """The activations of a model on the same tokens again and again: of the lookup, of each part of each block but its
    norms, of each block, and the logits.

    body: the module inside the engine. tokens_BT and starts_BT: equal on all ranks.
    """

    def __init__(
        self, model: LanguageModel, body: nn.Module, mesh: Mesh, tokens_BT: Tensor, starts_BT: Tensor | None
    ) -> None:
        self.model, self.body, self.mesh = model, body, mesh
        self.tokens_BT, self.starts_BT = tokens_BT, starts_BT
        self.first: dict[str, Tensor] = {}

    @torch.no_grad()
    def measure(self, step: int) -> list[Point]:
        """Returns the mean size of each activation, and of its change since the first call.

        Collectives: those of a forward, and one all-reduce of two numbers over the ranks that share the matrix.
        """
        found = self._activations()
        self.first = self.first or found
        sums = {name: torch.stack([x.abs().sum(), (x - self.first[name]).abs().sum()]) for name, x in found.items()}
        counts = {name: x.numel() for name, x in found.items()}
        counts[LOGITS] = self.tokens_BT.numel() * self.model.vocab.shard.vocab_size
        if self.mesh.vocab_size > 1:
            dist.all_reduce(sums[LOGITS], group=self.mesh.vocab_group)
        return [Point(step, name, *(both / counts[name]).tolist()) for name, both in sums.items()]

    def _activations(self) -> dict[str, Tensor]:
        """Returns the activations in float64: a sum of many in fp32 would depend on the ranks."""
        found: dict[str, Tensor] = {}
        vocab = self.model.vocab
        with recorded(self.body, found):
            hidden_BTD = vocab.lookup(self.tokens_BT, None, max_tokens_per_rank=self.tokens_BT.numel())
            found["embedding"] = hidden_BTD.double()
            hidden_ND = self.model.body(hidden_BTD, self.starts_BT).flatten(0, 1)
        rows_vD = vocab.output_weight[: vocab.shard.valid_rows].detach()
        return found | {LOGITS: logits_in(torch.float32, hidden_ND, rows_vD, vocab.config.softcap).double()}


@contextmanager
def recorded(body: nn.Module, found: dict[str, Tensor]) -> Iterator[None]:
    """Puts the outputs of blocks and of their parts into `found`, by their names, while the context lasts."""

    def keep(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        found[name] = output.double()

    handles = []
    for i, block in enumerate(body.blocks):  # type: ignore[arg-type]
        parts = [(f"block {i} {name}", part) for name, part in block.named_children() if "norm" not in name]
        for name, module in [*parts, (f"block {i}", block)]:
            handles.append(module.register_forward_hook(partial(keep, name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
