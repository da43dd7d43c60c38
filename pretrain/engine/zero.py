"""Access to DeepSpeed's fp32 weights, optimizer states and gradients, per ZeRO stage."""

from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ..mesh import Mesh
from ..optim import Optimizer, Piece, apply_clip, global_norm
from ..optim.owners import Cut

MAIN = ""  # kind of a main weight; other kinds are names of state tensors
Hidden = dict[int, tuple[torch.Size, tuple[int, ...]]]  # shape and stacked rows of hidden parameters, by their id


class Stage0Weights:
    """Stage 0: every rank holds all weights and states; DeepSpeed only sums gradients."""

    def __init__(self, zero: Any, optimizer: Optimizer, mesh: Mesh) -> None:
        self.zero, self.optimizer, self.mesh = zero, optimizer, mesh  # zero: DeepSpeed's optimizer around ours

    def stepped(self) -> list[Tensor]:
        """Tensors that the optimizer steps; they are the keys of its states."""
        return self.optimizer.parameters

    def units(self, hidden: Hidden) -> list[list[Piece]]:
        """Returns this rank's pieces of the hidden parameters; DeepSpeed steps those of a unit at once."""
        parameters = [parameter for parameter in self.stepped() if id(parameter) in hidden]
        return [[Piece(*hidden[id(p)], Cut(p.numel(), replicated=True), p, 0) for p in parameters]]

    def link_states(self) -> None:
        """Connects DeepSpeed to the states. Call it after they exist."""

    def read(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """Whole main weight or state tensor, fp32. From stage 1 on, collective."""
        return self.optimizer.state_of(parameter)[kind] if kind else parameter.detach()

    def write(self, parameter: nn.Parameter, whole: Tensor, kind: str) -> None:
        """Sets a main weight or state tensor. With a main weight, also sets the weight that the forward uses."""
        self.read(parameter, kind).copy_(whole)

    def refresh(self, parameter: nn.Parameter) -> None:
        """Sets the weight that the forward uses to the main weight. From stage 1 on, collective."""

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

    def units(self, hidden: Hidden) -> list[list[Piece]]:
        units = []
        for parameters, starts, flat in self._groups():
            size, pieces = flat.numel(), []
            for parameter, start in zip(parameters, starts, strict=True):
                if id(parameter) in hidden:
                    offset = max(0, start - self.mesh.rank * size)
                    pieces.append(Piece(*hidden[id(parameter)], Cut(size, start), flat, offset))
            units.append(pieces)
        return [pieces for pieces in units if pieces]

    def _groups(self) -> Iterable[tuple[list[nn.Parameter], list[int], Tensor]]:
        """Parameters of each group, where they start when concatenated, and this rank's part."""
        zero = self.zero
        flats = zero.single_partition_of_fp32_groups
        return zip(zero.round_robin_bit16_groups, zero.round_robin_bit16_offsets, flats, strict=True)

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

    def refresh(self, parameter: nn.Parameter) -> None:
        self.write(parameter, self.read(parameter, MAIN), MAIN)

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

    def _groups(self) -> Iterable[tuple[list[nn.Parameter], list[int], Tensor]]:
        groups = self.zero.bf16_groups
        starts = ([0, *accumulate(parameter.numel() for parameter in group[:-1])] for group in groups)
        return zip(groups, starts, self.zero.fp32_groups_flat_partition, strict=True)

    def _gradients(self) -> list[Tensor]:
        return self.zero.fp32_groups_gradient_flat_partition


class Stage3Weights(Stage1And2Weights):
    """Stage 3: each parameter is flattened and split over the ranks; the last part is padded."""

    def stepped(self) -> list[Tensor]:
        return self.zero.fp32_partitioned_groups_flat

    def units(self, hidden: Hidden) -> list[list[Piece]]:
        units = []
        for parameters, flat in zip(self.zero.fp16_groups, self.stepped(), strict=True):
            sizes = [parameter.ds_tensor.numel() for parameter in parameters]
            starts = accumulate(sizes[:-1], initial=0)
            found = zip(parameters, sizes, starts, strict=True)
            units.append([Piece(*hidden[id(p)], Cut(size), flat, at) for p, size, at in found if id(p) in hidden])
        return [pieces for pieces in units if pieces]

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
