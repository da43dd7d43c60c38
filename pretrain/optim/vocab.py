"""Optimizer of the matrix. Unlike the body's, it also reduces the gradients; for the body the engine does that."""

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from ..config.optim import OptimConfig
from ..mesh import Mesh
from .build import VOCAB_OPTIMIZER
from .clip import apply_clip, global_norm_and_sum
from .width import row_factors


class VocabOptimizer:
    """Steps this rank's rows. Replicas over `dp` stay equal because they get the same gradient and the same step."""

    def __init__(self, rows: Iterable[nn.Parameter], config: OptimConfig, mesh: Mesh, averaged: bool = False) -> None:
        """averaged: keep a running average of the rows."""
        self.rows = list(rows)
        self.mesh = mesh
        self.observers: list[Callable[[], None]] = []  # called after the gradients are summed, before they are clipped
        factors = {row: row_factors(config, row.shape[1]) for row in self.rows}
        self.optimizer = VOCAB_OPTIMIZER.build(self.rows, config, config.vocab, factors=factors)
        self.optimizer.averaged = averaged
        self.optimizer.load(step=0)

    def add_copy(self, rows: nn.Parameter, source: nn.Parameter) -> None:
        """Adds `rows`, a copy of `source`, with the same settings and a copy of its state. No collective."""
        self.rows.append(rows)
        self.optimizer.copy_state(rows, source)

    def reduce_gradients(self) -> None:
        """Sums the gradients over replicas, then calls the observers. One all-reduce per matrix."""
        self.mesh.sum_replicas(row.grad for row in self.rows if row.grad is not None)
        for observe in self.observers:
            observe()

    def grad_norm(self, loss: Tensor) -> Tensor:
        """Norm of the gradient of the whole matrix, and the sum of the ranks' losses, a float64 scalar each: [2]. One
        all-reduce of two numbers over all ranks.

        A sum over one vocab group would be enough, but the groups' sums could differ in the last bit; then replicas
        would clip differently and drift apart.
        """
        counts = self.mesh.first_replica
        mine = [row.grad for row in self.rows if row.grad is not None] if counts else []
        return global_norm_and_sum(mine, loss, self.mesh)

    def step(self, lr: float, clip: float) -> None:
        apply_clip([row.grad for row in self.rows if row.grad is not None], clip)
        self.optimizer.step(lr)

    def discard(self) -> None:
        """Frees the gradients without a step."""
        self.optimizer.discard()
