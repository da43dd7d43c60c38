"""FSDP2: `torch.distributed.fsdp.fully_shard` over all ranks, one group of parameters a block."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ..mesh import Mesh
from ..optim import OptimConfig, apply_clip, set_moments, step_at, sum_of_squares
from ..vocab import VocabShard
from .base import FIRST_MOMENT, SECOND_MOMENT


@dataclass
class FSDP2Config:
    """reshard_after_forward: free a block's gathered weights after forward and gather them again in backward."""

    name: str = "fsdp2"
    reshard_after_forward: bool = True

    def build(self, optim: OptimConfig, compute_dtype: torch.dtype, seed: int) -> "FSDP2Engine":
        return FSDP2Engine(self, optim, compute_dtype, seed)


class FSDP2Engine:
    """Main weights, gradients and moments are fp32 shards; matmuls run in `compute_dtype`."""

    def __init__(self, config: FSDP2Config, optim: OptimConfig, compute_dtype: torch.dtype, seed: int) -> None:
        self.config, self.optim, self.compute_dtype, self.seed = config, optim, compute_dtype, seed

    def wrap(self, body: nn.Module, mesh: Mesh) -> Callable[[Tensor], Tensor]:
        accurate = torch.promote_types(self.compute_dtype, torch.float32)
        policy = MixedPrecisionPolicy(param_dtype=self.compute_dtype, reduce_dtype=accurate)
        for module in (*body.blocks, body):  # type: ignore[misc]
            fully_shard(
                module,
                mesh=mesh.flat,
                mp_policy=policy,
                reshard_after_forward=self.config.reshard_after_forward,
            )
            assert isinstance(module, FSDPModule)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
        body.to_empty(device=mesh.device)
        # Kept from here: while its weights are gathered, the module shows others in their place.
        self.parameters: dict[str, DTensor] = dict(body.named_parameters())  # type: ignore[arg-type]
        for name, parameter in self.parameters.items():
            rows = VocabShard.of(mesh.rank, mesh.world, parameter.shape[0], multiple=1)  # FSDP2 cuts like this
            values = body.initial_rows(name, self.seed, rows.start, rows.stop)  # type: ignore[operator]
            local(parameter.detach()).copy_(values)
        self.body, self.mesh = body, mesh
        self.adamw = self.optim.adamw(self.parameters.values())  # type: ignore[arg-type]
        set_moments(self.adamw, step=0)
        return body

    def backward(self, loss: Tensor, last_micro_batch: bool) -> None:
        self.body.set_is_last_backward(last_micro_batch)  # type: ignore[operator]
        loss.backward()

    def grad_norm(self) -> Tensor:
        """One all-reduce of a number over all ranks."""
        square = sum_of_squares(self._local_gradients(), self.mesh.device)
        dist.all_reduce(square, group=self.mesh.flat.get_group())
        return square.sqrt()

    def step(self, lr: float, clip: float) -> None:
        apply_clip(self._local_gradients(), clip)
        step_at(self.adamw, lr)

    def state(self) -> dict[str, DTensor]:
        """The live shards themselves: filling them in place is loading them."""
        state: dict[str, DTensor] = {}
        for name, parameter in self.parameters.items():
            moments = self.adamw.state[parameter]
            state[name] = parameter.detach()  # type: ignore[assignment]
            state[FIRST_MOMENT + name] = moments["exp_avg"]
            state[SECOND_MOMENT + name] = moments["exp_avg_sq"]
        return state

    def load(self, state: dict[str, DTensor], step: int) -> None:
        set_moments(self.adamw, step)

    def _local_gradients(self) -> list[Tensor]:
        return [local(p.grad) for p in self.parameters.values() if p.grad is not None]


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local()
