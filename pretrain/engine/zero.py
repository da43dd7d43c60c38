"""Where DeepSpeed keeps fp32 weights and their moments, at each stage of ZeRO, and the norm of the gradients."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..mesh import Mesh
from ..optim import apply_clip, sum_of_squares
from .base import FIRST_MOMENT, SECOND_MOMENT

MAIN, MOMENTS = "", {FIRST_MOMENT: "exp_avg", SECOND_MOMENT: "exp_avg_sq"}


class Replicated:
    """Stage 0: every rank holds all, and DeepSpeed sums gradients only."""

    def __init__(self, optimizer: Any, adamw: torch.optim.AdamW, mesh: Mesh) -> None:
        self.optimizer, self.adamw, self.mesh = optimizer, adamw, mesh

    def stepped(self) -> list[Tensor]:
        """The tensors that AdamW steps, and under which it keeps their moments."""
        return [parameter for group in self.adamw.param_groups for parameter in group["params"]]

    def link_moments(self) -> None:
        """To be called once the moments are there."""

    def read(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """The whole main weight, or one of its moments, fp32."""
        return self.adamw.state[parameter][MOMENTS[kind]] if kind else parameter.detach()

    def write(self, parameter: nn.Parameter, whole: Tensor, kind: str) -> None:
        """Sets it, and with a main weight what the next forward computes with."""
        self.read(parameter, kind).copy_(whole)

    def grad_norm(self) -> Tensor:
        return self._norm_of_replicas(self._gradients())

    def clip(self, factor: float) -> None:
        apply_clip(self._gradients(), factor)

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.stepped() if parameter.grad is not None]

    def _norm_of_replicas(self, gradients: list[Tensor]) -> Tensor:
        """From the first rank, so that all get the same bits. One all-reduce of a number."""
        square = sum_of_squares(gradients if self.mesh.rank == 0 else [], self.mesh.device)
        dist.all_reduce(square, group=self.mesh.flat.get_group())
        return square.sqrt()


class Flat(Replicated):
    """Stages 1 and 2: AdamW steps this rank's part of all weights, laid end to end, in fp32."""

    norm = 0.0

    def link_moments(self) -> None:
        self.optimizer._lazy_init_hp_params_optimizer_state()  # else its first step does

    def read(self, parameter: nn.Parameter, kind: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if kind:
            return safe_get_full_optimizer_state(parameter, MOMENTS[kind])
        return safe_get_full_fp32_param(parameter)

    def write(self, parameter: nn.Parameter, whole: Tensor, kind: str) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if kind:
            safe_set_full_optimizer_state(parameter, whole, MOMENTS[kind])
        else:
            safe_set_full_fp32_param(parameter, whole)
            parameter.detach().copy_(whole)

    def grad_norm(self) -> Tensor:
        norm = self._norm()
        self.norm = float(norm)
        return norm

    def clip(self, factor: float) -> None:
        """DeepSpeed clips by clip_grad / (norm + 1e-6), and by nothing where that is 0."""
        self.optimizer.clip_grad = (self.norm + 1e-6) * factor if factor < 1 else 0.0

    def _norm(self) -> Tensor:
        return self.optimizer.scaled_global_norm()


class FlatBF16(Flat):
    """Stage 1 in bf16, for which DeepSpeed has an optimizer of its own: every rank has the whole sum of gradients."""

    def _norm(self) -> Tensor:
        gradients, _ = self.optimizer.get_grads_for_norm()
        return self._norm_of_replicas(gradients)


class Partitioned(Flat):
    """Stage 3: each parameter is cut on its own, flat, the last part padded."""

    def stepped(self) -> list[Tensor]:
        return self.optimizer.fp32_partitioned_groups_flat

    def link_moments(self) -> None:
        pass

    def write(self, parameter: nn.Parameter, whole: Tensor, kind: str) -> None:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        mine = whole.flatten()[self.mesh.rank * size :][:size]
        mine = nn.functional.pad(mine, (0, size - len(mine)))
        if kind:
            safe_set_local_optimizer_state(parameter, mine, MOMENTS[kind])
            return
        safe_set_local_fp32_param(parameter, mine)
        with GatheredParameters([parameter], modifier_rank=0):
            parameter.detach().copy_(whole)

    def _norm(self) -> Tensor:
        from deepspeed.runtime.utils import combine_grad_norm_groups

        return combine_grad_norm_groups(self.optimizer._get_norm_groups())


def weights_at(stage: int, low_precision: bool) -> type[Replicated]:
    if stage == 1 and low_precision:
        return FlatBF16
    return (Replicated, Flat, Flat, Partitioned)[stage]
