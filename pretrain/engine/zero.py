"""Access to DeepSpeed's fp32 weights, optimizer states and gradients, per ZeRO stage."""

from typing import Any

import torch
from torch import Tensor, nn

from ..mesh import Mesh
from ..optim import Optimizer, apply_clip, global_norm

MAIN = ""  # kind of a main weight; other kinds are names of state tensors


class Stage0Weights:
    """Stage 0: every rank holds all weights and states; DeepSpeed only sums gradients."""

    def __init__(self, zero: Any, optimizer: Optimizer, mesh: Mesh) -> None:
        self.zero, self.optimizer, self.mesh = zero, optimizer, mesh  # zero: DeepSpeed's optimizer around ours

    def stepped(self) -> list[Tensor]:
        """Tensors that the optimizer steps; they are the keys of its states."""
        return self.optimizer.parameters

    def link_states(self) -> None:
        """Connects DeepSpeed to the states. Call it after they exist."""

    def read(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """Whole main weight or state tensor, fp32. From stage 1 on, collective."""
        return self.optimizer.state_of(parameter)[kind] if kind else parameter.detach()

    def write(self, parameter: nn.Parameter, whole: Tensor, kind: str) -> None:
        """Sets a main weight or state tensor. With a main weight, also sets the weight that the forward uses."""
        self.read(parameter, kind).copy_(whole)

    def grad_norm(self) -> Tensor:
        """Norm of the gradients, which are equal on all ranks: only rank 0 counts. One all-reduce of one number."""
        return global_norm(self._gradients() if self.mesh.rank == 0 else [], self.mesh)

    def clip(self, factor: float) -> None:
        apply_clip(self._gradients(), factor)

    def _gradients(self) -> list[Tensor]:
        """Gradients on this rank for the next optimizer step. The caller changes them in place."""
        return [parameter.grad for parameter in self.stepped() if parameter.grad is not None]


class Stage1And2Weights(Stage0Weights):
    """Stages 1 and 2: the optimizer steps this rank's part of all weights, concatenated flat, in fp32.

    DeepSpeed's own norm is an fp32 sum that depends on the sharding. From stage 1 on, DeepSpeed computes it at each
    step and skips the step if it overflows. We replace it by 0: the trainer has already checked the norm and clipped.
    """

    def __init__(self, zero: Any, optimizer: Optimizer, mesh: Mesh) -> None:
        super().__init__(zero, optimizer, mesh)
        self._replace_norm(torch.zeros((), device=mesh.device))

    def _replace_norm(self, norm: Tensor) -> None:
        self.zero.scaled_global_norm = lambda: norm

    def link_states(self) -> None:
        self.zero._lazy_init_hp_params_optimizer_state()  # otherwise DeepSpeed does it at its first step

    def read(self, parameter: nn.Parameter, kind: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if kind:
            return safe_get_full_optimizer_state(parameter, kind)
        return safe_get_full_fp32_param(parameter)

    def write(self, parameter: nn.Parameter, whole: Tensor, kind: str) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if kind:
            safe_set_full_optimizer_state(parameter, whole, kind)
        else:
            safe_set_full_fp32_param(parameter, whole)
            parameter.detach().copy_(whole)

    def grad_norm(self) -> Tensor:
        """Norm over the parts of all ranks. One all-reduce of one number."""
        return global_norm(self._gradients(), self.mesh)

    def _gradients(self) -> list[Tensor]:
        if self._offloaded():
            return super()._gradients()
        return [part for parts in self.zero.averaged_gradients.values() for part in parts]

    def _offloaded(self) -> bool:
        """Returns True if gradients are offloaded to host memory. Waits for the copies."""
        if self.zero.cpu_offload:
            self.zero._wait_for_offload_copies()
        return self.zero.cpu_offload


class Stage1BF16Weights(Stage1And2Weights):
    """Stage 1 in bf16, which has a separate optimizer in DeepSpeed."""

    def _replace_norm(self, norm: Tensor) -> None:
        self.zero.get_grads_for_norm = lambda: ([norm], {})

    def _gradients(self) -> list[Tensor]:
        return self.zero.fp32_groups_gradient_flat_partition


class Stage3Weights(Stage1And2Weights):
    """Stage 3: each parameter is flattened and split over the ranks; the last part is padded."""

    def stepped(self) -> list[Tensor]:
        return self.zero.fp32_partitioned_groups_flat

    def link_states(self) -> None:
        pass

    def write(self, parameter: nn.Parameter, whole: Tensor, kind: str) -> None:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        mine = whole.flatten()[self.mesh.rank * size :][:size]
        mine = nn.functional.pad(mine, (0, size - len(mine)))
        if kind:
            safe_set_local_optimizer_state(parameter, mine, kind)
            return
        safe_set_local_fp32_param(parameter, mine)
        with GatheredParameters([parameter], modifier_rank=0):
            parameter.detach().copy_(whole)

    def _replace_norm(self, norm: Tensor) -> None:
        self.zero._get_norm_groups = lambda: [norm]

    def _offloaded(self) -> bool:
        return self.zero.offload_optimizer  # backward has already waited for the copies


def weights_at(stage: int, low_precision: bool) -> type[Stage0Weights]:
    """Returns the class for this stage. low_precision: the compute dtype is not fp32."""
    if stage == 1 and low_precision:
        return Stage1BF16Weights
    return (Stage0Weights, Stage1And2Weights, Stage1And2Weights, Stage3Weights)[stage]
