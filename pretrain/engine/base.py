"""Interface of an engine, as the trainer needs it. Only the body meets it; the matrix never does."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..mesh import Mesh


class Engine(Protocol):
    """Shards a body over all ranks of the mesh, and owns its gradients and its optimizer.

    A loss arrives divided by the targets of the global batch, so gradients are summed over ranks, not averaged.
    """

    body: nn.Module  # what was wrapped, its parts by their names; it is called by what `wrap` returned alone

    def wrap(self, body: nn.Module, mesh: Mesh) -> Callable[..., Tensor]:
        """Takes over a body on the meta device, draws its initial weights; what it returns is called as the body is."""
        ...

    def backward(self, loss: Tensor, last_micro_batch: bool) -> None:
        """Adds the gradients of one micro-batch."""
        ...

    def grad_norm(self) -> Tensor:
        """Norm of the body's gradient over all ranks, before clipping: a scalar."""
        ...

    def step(self, lr: float, clip: float) -> None:
        """One optimizer step on gradient · clip, which is the factor computed over body and matrix."""
        ...

    def state(self) -> dict[str, DTensor]:
        """Tensors by full name: fp32 parameters and the optimizer's state. To be filled in place before `load`."""
        ...

    def load(self, state: dict[str, DTensor], step: int) -> None:
        """Takes a filled `state`, and the number of optimizer steps behind it."""
        ...
