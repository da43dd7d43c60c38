"""The optimizer of the matrix. Apart from the others: it owns the gradients too, which an engine does for the body."""

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from ..config.optim import OptimConfig
from ..mesh import Mesh
from .build import VOCAB_OPTIMIZER
from .clip import apply_clip, global_norm


class VocabOptimizer:
    """Steps this rank's rows. The rows are replicated over `dp`, and stay equal: same gradient, same step."""

    def __init__(self, rows: Iterable[nn.Parameter], config: OptimConfig, mesh: Mesh) -> None:
        self.rows = list(rows)
        self.mesh = mesh
        self.observers: list[Callable[[], None]] = []  # of the summed gradients, before they are clipped
        self.optimizer = VOCAB_OPTIMIZER.build(self.rows, config, config.vocab)
        self.optimizer.load(step=0)

    def add_copy(self, rows: nn.Parameter, source: nn.Parameter) -> None:
        """Takes on `rows`, a copy of `source`: with its settings, and a copy of its state. Local."""
        self.rows.append(rows)
        self.optimizer.copy_state(rows, source)

    def reduce_gradients(self) -> None:
        """Sums the gradients of the replicas, one all-reduce per matrix; and what observers do."""
        self.mesh.sum_replicas(row.grad for row in self.rows if row.grad is not None)
        for observe in self.observers:
            observe()

    def grad_norm(self) -> Tensor:
        """Norm of the whole matrix's gradient, float64 scalar. One all-reduce of a number over all ranks.

        Over all, though one vocab group would do: each group's sum could differ in the last bit, and replicas that
        clip differently drift apart.
        """
        counts = self.mesh.first_replica
        return global_norm([row.grad for row in self.rows if row.grad is not None] if counts else [], self.mesh)

    def step(self, lr: float, clip: float) -> None:
        apply_clip([row.grad for row in self.rows if row.grad is not None], clip)
        self.optimizer.step(lr)
