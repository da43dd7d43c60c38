"""Interface of an engine. An engine handles the body only, never the matrix."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..mesh import Mesh


class Engine(Protocol):
    """Shards a body over all ranks of the mesh; owns its gradients and its optimizer.

    The loss is already divided by the number of targets in the global batch, so gradients are summed over ranks, not
    averaged.
    """

    body: nn.Module  # the module given to `wrap`, to look up parts by name; call the result of `wrap` instead

    def wrap(self, body: nn.Module, mesh: Mesh) -> Callable[..., Tensor]:
        """Shards a body on the meta device and draws its initial weights. Call the result in place of the body."""
        ...

    def backward(self, loss: Tensor, last_micro_batch: bool) -> None:
        """Adds the gradients of one micro-batch."""
        ...

    def grad_norm(self) -> Tensor:
        """Norm of the body's gradient over all ranks, before clipping: a scalar."""
        ...

    def step(self, lr: float, clip: float, momentum: float | None = None) -> None:
        """Takes one optimizer step on gradient · clip. clip: the factor computed over body and matrix. momentum: of the
        optimizer, if it has one; None: as before.
        """
        ...

    def discard(self) -> None:
        """Frees the gradients without a step: weights and optimizer states keep their bits."""
        ...

    def average(self, share: float) -> None:
        """Moves this rank's part of the running average towards the weights by `share`; 1: a copy. No collective."""
        ...

    def swap_averages(self) -> None:
        """Exchanges weights and running average in place; the forward then uses the average. Collective."""
        ...

    def averages(self) -> dict[str, DTensor]:
        """Returns the running average of each parameter, as `state` does. To restore, fill and `load_averages`."""
        ...

    def load_averages(self, state: dict[str, DTensor]) -> None:
        """Restores the running averages from filled `averages`."""
        ...

    def state(self) -> dict[str, DTensor]:
        """Returns fp32 parameters and optimizer state by full name. To restore, fill them in place and call `load`."""
        ...

    def load(self, state: dict[str, DTensor], step: int) -> None:
        """Restores from a filled `state`. step: number of optimizer steps done."""
        ...
