"""The owner of the token-embedding matrix: one parameter for both uses (tied), or two (untied), or one, then two."""

from collections.abc import Container, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config.vocab import VocabConfig
from .full_state import check_names, gather_matrix, rows_dtensor, scatter_matrix
from .guard import GuardedRows
from .kernels import choose_kernels
from .lookup import LookupPlan, vocab_parallel_lookup
from .loss import VocabLoss, vocab_parallel_linear_cross_entropy
from .shard import VocabShard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class VocabParallelEmbedding(GuardedRows):
    """This rank's rows of the matrix: `weight` [v, D], and `head_weight` [v, D] where it is untied, or was split.

    Both are main weights of `dtype`, and no engine sees them: wrapping them is an error, see guard.py. `compute_dtype`
    is what the lookup hands out and what the loss multiplies in. `group` are the ranks of the shard's world; None where
    that is one.
    """

    def __init__(
        self,
        config: VocabConfig,
        shard: VocabShard,
        width: int,
        *,
        seed: int,
        std: float = 0.02,
        group: dist.ProcessGroup | None = None,
        compute_dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(shard, group)
        self.config, self.compute_dtype = config, compute_dtype

        def rows(name: str) -> nn.Parameter:
            return nn.Parameter(shard.initial_rows(name, seed, width, std).to(device, dtype))

        self.weight = rows("embedding.weight")
        self.head_weight = rows("head.weight") if config.tie == "untied" else None
        self.kernels = choose_kernels(self.weight.device)
        self.input_grad_vD: Tensor | None = None  # where given, backward adds the lookup's gradient to it as well
        self._checked = False

    @classmethod
    def create(
        cls,
        vocab_size: int,
        width: int,
        *,
        group: dist.ProcessGroup | None = None,
        seed: int = 0,
        std: float = 0.02,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype | None = None,
        **settings: Any,
    ) -> "VocabParallelEmbedding":
        """This rank's rows of a matrix [vocab_size, width] that is split over `group` (None: over all ranks).

        To be called on all ranks, after init_process_group; without one, this process holds the matrix alone. Any split
        of one seed builds the same matrix. `compute_dtype`: None is `dtype`. `settings`: further fields of VocabConfig.
        Raises ValueError on a setting out of range and TypeError on an unknown one. Local.
        """
        trainers = {"size", "parallel", "untie_at"} & set(settings)
        if trainers:
            raise ValueError(f"vocab.{min(trainers)} is a setting of the trainer: here vocab_size, group or untie() is")
        config = VocabConfig(size=vocab_size, **settings)
        if group is None and dist.is_initialized():
            group = dist.group.WORLD
        rank, world = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        shard = VocabShard.of(rank, world, vocab_size, config.multiple)
        compute = dtype if compute_dtype is None else compute_dtype
        return cls(
            config, shard, width, seed=seed, std=std, group=group, compute_dtype=compute, device=device, dtype=dtype
        )

    @property
    def output_weight(self) -> nn.Parameter:
        """The rows that make the logits, [v, D]."""
        return self.weight if self.head_weight is None else self.head_weight

    def untie(self) -> nn.Parameter:
        """Splits a tied matrix: from now on the head's rows are a parameter of their own, which this returns, a copy.

        Between steps: what the rows have of a gradient stays with the embedding. Local.
        """
        assert self.head_weight is None, "it is untied"
        self.head_weight = nn.Parameter(self.weight.detach().clone())
        return self.head_weight

    def match(self, saved: Container[str]) -> nn.Parameter | None:
        """Splits a matrix that is to be split at some step if a checkpoint with tensors `saved` has it split; the rows
        that are new, if so.
        """
        due = self.head_weight is None and self.config.untie_at is not None
        return self.untie() if due and "head.weight" in saved else None

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """The lookup, for ranks with any number of tokens each.

        Raises RuntimeError at the first call if something has overwritten the rows, see `GuardedRows.check_distinct`;
        and if this process holds the matrix alone, but has peers by now.
        """
        if self.group is None and dist.is_initialized() and dist.get_world_size() > 1:
            raise RuntimeError(
                "this VocabParallelEmbedding was created before the process group, so every rank has a matrix of its"
                " own: create it after init_process_group"
            )
        if not self._checked:
            self.check_distinct()
            self._checked = True
        return self.lookup(tokens_BT)

    def lookup(
        self, tokens_BT: Tensor, plan: LookupPlan | None = None, max_tokens_per_rank: int | None = None
    ) -> Tensor:
        """embed_scale · hidden [B, T, D] in the compute dtype; backward adds to the rows' `grad`.

        Plan, `max_tokens_per_rank` and collectives: see `vocab_parallel_lookup`.
        """
        hidden_ND = vocab_parallel_lookup(
            tokens_BT.flatten(),
            self.weight,
            shard=self.shard,
            group=self.group,
            dtype=self.compute_dtype,
            plan=plan,
            max_tokens_per_rank=max_tokens_per_rank,
            main_grad=self._input_grads,
        )
        if self.config.embed_scale != 1:
            hidden_ND = hidden_ND * self.config.embed_scale
        if self.config.input_grad_scale != 1 and hidden_ND.requires_grad:
            hidden_ND.register_hook(lambda dhidden_ND: dhidden_ND * self.config.input_grad_scale)
        return hidden_ND.unflatten(0, tokens_BT.shape)

    def loss(
        self,
        hidden_BTD: Tensor,
        targets_BT: Tensor,
        scale: float | None = None,
        metrics: bool = False,
        max_tokens_per_rank: int | None = None,
    ) -> VocabLoss:
        """Sum of the loss over this rank's targets (-100: none).

        With `scale`, which must be the same on all ranks, it is multiplied by it, and the gradient of the rows is in
        their `grad` when this returns: to be followed by one backward() on the loss as it is. `max_tokens_per_rank`:
        the largest number of targets on a rank of the group, if it is known. `metrics` and collectives: see
        `vocab_parallel_linear_cross_entropy`.
        """
        rows = self.output_weight
        final = scale is not None and torch.is_grad_enabled()
        main_grad_vD = _main_grad(rows) if final else None
        out = vocab_parallel_linear_cross_entropy(
            hidden_BTD.flatten(0, 1).to(self.compute_dtype),
            rows,
            targets_BT.flatten(),
            shard=self.shard,
            group=self.group,
            z_loss=self.config.z_loss,
            label_smoothing=self.config.label_smoothing,
            softcap=self.config.softcap,
            memory_mib=self.config.head_memory_mib,
            metrics=metrics,
            max_tokens_per_rank=max_tokens_per_rank,
            scale=1.0 if scale is None else scale,
            main_grad_vD=main_grad_vD,
            kernels=self.kernels,
        )
        if out.loss.requires_grad and main_grad_vD is not None:
            out.loss.register_hook(lambda _: _check_kept(rows, main_grad_vD))
        return out

    def _input_grads(self) -> list[Tensor]:
        return [_main_grad(self.weight), *([] if self.input_grad_vD is None else [self.input_grad_vD])]

    def named_rows(self) -> dict[str, nn.Parameter]:
        """The parameters by their names in a checkpoint, those of the unsharded model."""
        rows = {"embedding.weight": self.weight}
        if self.head_weight is not None:
            rows["head.weight"] = self.head_weight
        return rows

    def full_state_dict(self, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """Whole matrices [V, D] without padding, by their names in a checkpoint, copies on every rank.

        `device`: where they are put (None: the rows'). To be called on all ranks of the group. One all-gather of each.
        """
        return {
            name: gather_matrix(rows.detach(), self.shard, self.group).to(device or rows.device)
            for name, rows in self.named_rows().items()
        }

    def load_full_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Takes this rank's rows of whole matrices, [V, D] or padded. Local.

        Raises ValueError if a name is missing or unknown, or a shape is another.
        """
        check_names(state, self.named_rows())
        for name, rows in self.named_rows().items():
            scatter_matrix(state[name], rows.detach(), self.shard, name)

    def dtensor_state_dict(self) -> "dict[str, DTensor]":
        """The rows as DTensors [padded_size, D], by their names in a checkpoint, for torch.distributed.checkpoint.

        They share the rows' memory: loading into them loads the rows. The first call makes a mesh of the group.
        Raises RuntimeError without a process group.
        """
        return {name: self.dtensor(rows.detach()) for name, rows in self.named_rows().items()}

    def dtensor(self, rows_vD: Tensor) -> "DTensor":
        """Any tensor like the rows, as a moment of an optimizer, as a DTensor: see `dtensor_state_dict`."""
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.tensor import Shard

        if self.group is None:
            raise RuntimeError("DTensors need a process group; without one, full_state_dict() has the matrices")
        mesh = DeviceMesh.from_group(self.group, rows_vD.device.type)
        return rows_dtensor(rows_vD, self.shard, mesh, [Shard(0)])

    def _apply(self, fn: Any, recurse: bool = True) -> "VocabParallelEmbedding":
        super()._apply(fn, recurse)
        self.kernels = choose_kernels(self.weight.device)
        return self


def _check_kept(weight_vD: nn.Parameter, main_grad_vD: Tensor) -> None:
    """Raises RuntimeError if the gradient that loss(scale=...) made is not the parameter's any more."""
    if weight_vD.grad is not main_grad_vD:
        raise RuntimeError(
            "the rows' gradient is made by loss(scale=...), and was zeroed between loss and backward: zero gradients"
            " after the optimizer's step, or call loss without scale and multiply it"
        )


def _main_grad(weight_vD: nn.Parameter) -> Tensor:
    """The parameter's gradient, as autograd accumulates it; zeros where there is none yet."""
    if weight_vD.grad is None:
        weight_vD.grad = torch.zeros_like(weight_vD)
    return weight_vD.grad
