"""Muon: steps the hidden matrices by their momentum, orthogonalised. Everything else of the body takes AdamW's step."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config.optim import Hyperparameters, MuonConfig, OptimConfig, OwnerConfig
from .adamw import AdamW, groups_of, step_group
from .base import Optimizer, Piece, local
from .exchange import Exchange
from .owners import STEPS, Schedule, matrices_of
from .width import NONE, SAME, Factors

MOMENTUM = "momentum_buffer"  # torch's name
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of Newton-Schulz: a quintic with the largest slope at 0
SMALLEST_NORM = 1e-7
RMS = 0.2  # of an update of AdamW, which the update of a matrix gets as well
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # of optim.newton_schulz


class Muon(Optimizer):
    """Muon (Jordan et al., kellerjordan.github.io/posts/muon, 2024) for the 2-d weights of the blocks, as
    torch.optim.Muon with adjust_lr_fn="match_rms_adamw" (Liu et al., arXiv:2502.16982, §2.2).

    Each matrix has one state, the momentum, in fp32. One rank of the group orthogonalises it, whole: a matrix stacked
    with others in one parameter is a matrix of its own. Gradients are clipped before.

    A step of the matrices has two all-to-alls per round (`owners.Schedule`), in the dtype of Newton-Schulz: a rank
    sends the numbers that it holds to their owners, and its owned matrices back. The first takes place while the
    matrices of the round before are computed.
    """

    whole_matrices = True

    def __init__(self, stepper: "Stepper", chosen: Hyperparameters, dtype: torch.dtype | None) -> None:
        super().__init__(stepper, chosen.lr_factor, chosen.decay_peak)
        self._stepper, self.dtype = stepper, dtype  # None: the dtype of the engine's matmuls

    @classmethod
    def build(
        cls,
        parameters: Iterable[nn.Parameter],
        optim: OptimConfig,
        own: OwnerConfig,
        hidden: Iterable[nn.Parameter] = (),
        factors: Mapping[nn.Parameter, Factors] = NONE,
    ) -> Self:
        assert isinstance(optim, MuonConfig)
        chosen, matrices = optim.hyperparameters(own), list(hidden)
        ids = {id(matrix) for matrix in matrices}
        common = factors.get(matrices[0], SAME) if matrices else SAME
        settings = {"weight_decay": chosen.weight_decay * common.weight_decay, "momentum": optim.momentum}
        groups = [
            {"params": matrices, "width_factor": common.lr, **settings},
            *groups_of((parameter for parameter in parameters if id(parameter) not in ids), chosen, factors),
        ]
        return cls(Stepper(groups), chosen, DTYPES.get(optim.newton_schulz))

    @staticmethod
    def state_names(shape: torch.Size, hidden: bool = False) -> tuple[str, ...]:
        return (MOMENTUM,) if hidden else AdamW.state_names(shape)

    @staticmethod
    def group_of(shape: torch.Size, hidden: bool) -> int:
        return 0 if hidden else 1 + AdamW.group_of(shape, hidden)

    def names_of(self, parameter: Tensor) -> tuple[str, ...]:
        return self.state_names(parameter.shape, id(parameter) in self._stepper.units)

    def place(self, units: list[list[Piece]], group: dist.ProcessGroup | None, dtype: torch.dtype) -> None:
        made = [(unit, Unit(unit, group, self.dtype or dtype)) for unit in units]
        self._stepper.units = {id(piece.tensor): steps for unit, steps in made for piece in unit}


class Stepper(torch.optim.Optimizer):
    """Torch optimizer that engines call: groups with `momentum` take Muon's step, the others AdamW's."""

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0})
        self.units: dict[int, Unit] = {}  # by the id of each stepped tensor with hidden matrices

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if "momentum" not in group:
                step_group(group, self.state)
                continue
            for unit in {id(steps): steps for steps in (self.units[id(tensor)] for tensor in group["params"])}.values():
                unit.step(self.state, group["lr"], group["weight_decay"], group["momentum"])


class Unit:
    """Matrices that are stepped together, on this rank."""

    def __init__(self, pieces: list[Piece], group: dist.ProcessGroup | None, dtype: torch.dtype) -> None:
        self.pieces, self.dtype = pieces, dtype
        ranks = 1 if group is None else dist.get_world_size(group)
        self.schedule = Schedule(matrices_of((piece.shape, piece.stacked, piece.cut) for piece in pieces), ranks)
        self.exchange = Exchange(self.schedule, group, dtype, local(pieces[0].tensor).device)
        self.parts = [self._part(index) for index in range(len(self.schedule.matrices))]

    def step(self, states: Any, lr: float, weight_decay: float, momentum: float) -> None:
        """Updates the weights and the momentum. Two all-to-alls per round."""

        def gathering(number: int) -> Callable[[], dict[int, Tensor]]:
            indices = [index for mine in self.schedule.rounds[number] for index in mine]
            return self.exchange.gather(number, {index: self._update(index, states, momentum) for index in indices})

        def apply(results: dict[int, Tensor]) -> None:
            for index, result in results.items():
                matrix, weight = self.schedule.matrices[index], self._flat(index, self._tensor(index))
                weight.mul_(1 - lr * weight_decay)
                weight.add_(result, alpha=-lr * (RMS * math.sqrt(max(matrix.rows, matrix.columns))))

        rounds, earlier = len(self.schedule.rounds), None
        arriving = gathering(0)
        for number in range(rounds):
            matrices = arriving()
            if number + 1 < rounds:
                arriving = gathering(number + 1)
            results = {index: orthogonal(matrix) for index, matrix in matrices.items()}
            if earlier is not None:
                apply(earlier())
            earlier = self.exchange.scatter(number, results)
        assert earlier is not None
        apply(earlier())

    def _update(self, index: int, states: Any, momentum: float) -> Tensor:
        """Updates this rank's part of the momentum. Returns Nesterov's update, flat, in the dtype of Newton-Schulz."""
        tensor = self._tensor(index)
        if self.parts[index][1] == 0:
            return torch.empty(0, dtype=self.dtype, device=self.exchange.device)
        assert tensor.grad is not None, "a hidden matrix has no gradient"
        gradient, mean = self._flat(index, tensor.grad), self._flat(index, states[tensor][MOMENTUM])
        mean.lerp_(gradient, 1 - momentum)
        return gradient.lerp(mean, momentum).to(self.dtype)

    def _tensor(self, index: int) -> Tensor:
        return self.pieces[self.schedule.matrices[index].parameter].tensor

    def _flat(self, index: int, tensor: Tensor) -> Tensor:
        """Returns this rank's part of a matrix: a view of the stepped tensor, or of its gradient or state."""
        return local(tensor).view(-1).narrow(0, *self.parts[index])

    def _part(self, index: int) -> tuple[int, int]:
        """Offset of this rank's part of a matrix in the flattened local tensor, and its length."""
        matrix = self.schedule.matrices[index]
        piece, rank = self.pieces[matrix.parameter], self.exchange.rank
        start, stop = matrix.span(rank)
        if start == stop:
            return 0, 0
        return piece.offset + matrix.start + start - matrix.cut.span(rank, matrix.whole)[0], stop - start


def orthogonal(matrix: Tensor) -> Tensor:
    """Returns the matrix with its singular values moved into about [0.7, 1.2], by Newton-Schulz, in its own dtype.

    Scaling the matrix changes nothing. Bernstein & Newhouse, arXiv:2409.20325; coefficients: Jordan et al.
    """
    a, b, c = COEFFICIENTS
    wide = matrix.T if len(matrix) > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=SMALLEST_NORM)
    for _ in range(STEPS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if len(matrix) > matrix.shape[1] else wide
