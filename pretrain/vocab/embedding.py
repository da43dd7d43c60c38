"""The owner of the token-embedding matrix: one parameter for both uses (tied), two (untied), or first one, then two."""

from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config.vocab import VocabConfig
from .full_state import check_names, gather_matrix, rows_dtensor, scatter_matrix
from .guard import GuardedRows
from .kernels import choose_kernels
from .lookup import LookupPlan, vocab_parallel_lookup
from .loss import VocabLoss, compute_rows, vocab_parallel_linear_cross_entropy
from .shard import VocabShard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class VocabParallelEmbedding(GuardedRows):
    """The token-embedding matrix, whose rows are split over the ranks: input lookup, output head and loss.

    `weight` [v, D] holds this rank's rows; `head_weight` [v, D] holds those of the head if the matrix is untied, or was
    split. Both are main weights of `dtype`. No engine may shard or copy them: guard.py makes that an error.
    `compute_dtype` is the dtype of the lookup's result and of the loss's matmuls. `group`: the ranks that share the
    matrix; None if this process has it alone.

    One step in one process; `torchrun` runs the same lines on several ranks, after init_process_group:

    >>> vocab = VocabParallelEmbedding.create(1000, 16, seed=0)
    >>> optimizer = torch.optim.AdamW(vocab.parameters(), lr=0.01)
    >>> tokens, targets = torch.tensor([[5, 6, 7]]), torch.tensor([[6, 7, 8]])
    >>> loss = vocab.loss(vocab(tokens), targets, scale=1 / 3).loss  # a real model has a body between the two
    >>> loss.backward()
    >>> optimizer.step()
    >>> round(loss.item(), 2)
    6.91
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
        self.input_grad_vD: Tensor | None = None  # if it is set, backward adds the lookup's gradient to it as well
        self._checked = False
        self._shares_rows = False  # see rows_unchanged
        self._shared_rows_vD: Tensor | None = None

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
        """Builds this rank's rows of a matrix [vocab_size, width] that is shared by `group` (None: by all ranks).

        Call it on all ranks, after init_process_group; without a process group, this process holds the matrix alone.
        The seed decides the matrix, for any number of ranks. `compute_dtype`: None means `dtype`. `settings`: further
        fields of VocabConfig. Raises ValueError if a setting is out of range, and TypeError if it is unknown. Local.

        >>> vocab = VocabParallelEmbedding.create(1000, 16, seed=0, tie="untied", softcap=30.0)
        >>> vocab.weight.shape  # all rows, in one process; padded to a multiple of 128
        torch.Size([1024, 16])
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
        """Rows that make the logits, [v, D]."""
        return self.weight if self.head_weight is None else self.head_weight

    def untie(self) -> nn.Parameter:
        """Splits a tied matrix: from now on the head has its own rows, a copy; returns them as a new parameter.

        Call it between steps: a gradient that the rows already have stays with the embedding. Local.

        >>> vocab = VocabParallelEmbedding.create(1000, 16)
        >>> head = vocab.untie()
        >>> torch.equal(head, vocab.weight), head is vocab.output_weight
        (True, True)
        """
        assert self.head_weight is None, "it is untied"
        self.head_weight = nn.Parameter(self.weight.detach().clone())
        return self.head_weight

    def match(self, saved: Container[str]) -> nn.Parameter | None:
        """Splits the matrix if `untie_at` is set and the checkpoint with tensors `saved` has it split already.

        Returns the new rows, or None if nothing was split.
        """
        due = self.head_weight is None and self.config.untie_at is not None
        return self.untie() if due and "head.weight" in saved else None

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Looks tokens up; each rank may have any number of them. All ranks of the group call it together.

        Raises RuntimeError at the first call if something has overwritten the rows (`GuardedRows.check_distinct`), and
        if this process built the matrix alone, but now belongs to a process group.

        >>> vocab = VocabParallelEmbedding.create(1000, 16)
        >>> vocab(torch.tensor([[1, 2, 3], [1, 2, 3]])).shape
        torch.Size([2, 3, 16])
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
        """Returns embed_scale · rows, [B, T, D] in the compute dtype; backward adds to the rows' `grad`.

        `vocab_parallel_lookup` describes `plan`, `max_tokens_per_rank` and the collectives.

        >>> vocab = VocabParallelEmbedding.create(1000, 16, embed_scale=4.0)
        >>> torch.equal(vocab.lookup(torch.tensor([7])), 4 * vocab.weight[[7]])
        True
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
        """Computes the sum of the loss over this rank's targets (-100: ignored). All ranks call it together.

        With `scale`, the same number on all ranks, the loss is multiplied by it, and the gradient of the rows is in
        their `grad` when the call returns; then call backward() on the loss once, without another factor. Without
        `scale`, any factor may follow. `max_tokens_per_rank`: the largest number of targets on a rank of the group, if
        you know it. `vocab_parallel_linear_cross_entropy` describes `metrics` and the collectives.

        >>> vocab = VocabParallelEmbedding.create(1000, 16)
        >>> out = vocab.loss(torch.zeros(1, 3, 16), torch.tensor([[6, 7, -100]]))
        >>> round(out.loss.item(), 3), out.n_tokens.item()  # 2 · log(1000): padding rows take no part
        (13.816, 2)
        """
        rows = self.output_weight
        main_grad_vD = None
        if scale is not None and torch.is_grad_enabled():
            main_grad_vD = torch.empty_like(rows) if rows.grad is None else rows.grad
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
            main_grad_is_new=rows.grad is None,
            compute_weight_vD=self._compute_rows(),
            kernels=self.kernels,
        )
        if main_grad_vD is not None:
            rows.grad = main_grad_vD
        if out.loss.requires_grad and main_grad_vD is not None:
            out.loss.register_hook(lambda _: _check_kept(rows, main_grad_vD))
        return out

    @contextmanager
    def rows_unchanged(self) -> Iterator[None]:
        """Promises that the rows stay as they are: calls of `loss` in this context share one copy in the compute dtype.

        For the micro-batches of a step, and for an evaluation. The copy is freed at the end. Local.

        >>> vocab = VocabParallelEmbedding.create(1000, 16, compute_dtype=torch.bfloat16)
        >>> with vocab.rows_unchanged():
        ...     losses = [vocab.loss(torch.zeros(1, 2, 16), torch.tensor([[6, 7]]), scale=0.5).loss for _ in range(2)]
        """
        self._shares_rows = True
        try:
            yield
        finally:
            self._shares_rows, self._shared_rows_vD = False, None

    def _compute_rows(self) -> Tensor | None:
        if self._shares_rows and self._shared_rows_vD is None:
            self._shared_rows_vD = compute_rows(self.output_weight, self.shard, self.compute_dtype)
        return self._shared_rows_vD

    def _input_grads(self) -> list[Tensor]:
        return [_main_grad(self.weight), *([] if self.input_grad_vD is None else [self.input_grad_vD])]

    def named_rows(self) -> dict[str, nn.Parameter]:
        """Returns the parameters by their names in a checkpoint, which are those of the unsharded model.

        >>> list(VocabParallelEmbedding.create(1000, 16, tie="untied").named_rows())
        ['embedding.weight', 'head.weight']
        """
        rows = {"embedding.weight": self.weight}
        if self.head_weight is not None:
            rows["head.weight"] = self.head_weight
        return rows

    def full_state_dict(self, device: torch.device | str | None = None) -> dict[str, Tensor]:
        """Returns copies of the whole matrices [V, D], without padding, by their names in a checkpoint, on every rank.

        `device`: the device of the copies (None: the rows' device). All ranks of the group call it together. One
        all-gather per matrix.

        >>> state = VocabParallelEmbedding.create(1000, 16).full_state_dict()
        >>> {name: tuple(matrix.shape) for name, matrix in state.items()}
        {'embedding.weight': (1000, 16)}
        """
        return {
            name: gather_matrix(rows.detach(), self.shard, self.group).to(device or rows.device)
            for name, rows in self.named_rows().items()
        }

    def load_full_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies this rank's rows from whole matrices, [V, D] or padded. Local.

        Raises ValueError if a name is missing or unknown, or a shape does not match.

        >>> vocab = VocabParallelEmbedding.create(1000, 16)
        >>> vocab.load_full_state_dict({"embedding.weight": torch.ones(1000, 16)})
        >>> vocab.weight.sum().item()  # padding stays 0
        16000.0
        """
        check_names(state, self.named_rows())
        for name, rows in self.named_rows().items():
            scatter_matrix(state[name], rows.detach(), self.shard, name)

    def dtensor_state_dict(self) -> "dict[str, DTensor]":
        """Returns the rows as DTensors [padded_size, D], by their names in a checkpoint.

        They are meant for torch.distributed.checkpoint. They share the rows' memory: loading into them loads the rows.
        The first call makes a mesh of the group. Raises RuntimeError without a process group.

        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> vocab = VocabParallelEmbedding.create(1000, 16)
        >>> vocab.dtensor_state_dict()["embedding.weight"].shape
        torch.Size([1024, 16])
        >>> dist.destroy_process_group()
        """
        return {name: self.dtensor(rows.detach()) for name, rows in self.named_rows().items()}

    def dtensor(self, rows_vD: Tensor) -> "DTensor":
        """Returns any tensor shaped like the rows, such as an optimizer's moment, as a DTensor.

        See `dtensor_state_dict`. Raises RuntimeError without a process group.

        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> vocab = VocabParallelEmbedding.create(1000, 16)
        >>> moment = torch.zeros_like(vocab.weight)
        >>> vocab.dtensor(moment).placements
        (Shard(dim=0),)
        >>> dist.destroy_process_group()
        """
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
    """Raises RuntimeError if the gradient that loss(scale=...) made is no longer the parameter's gradient."""
    if weight_vD.grad is not main_grad_vD:
        raise RuntimeError(
            "the rows' gradient is made by loss(scale=...), and was zeroed between loss and backward: zero gradients"
            " after the optimizer's step, or call loss without scale and multiply it"
        )


def _main_grad(weight_vD: nn.Parameter) -> Tensor:
    """Returns the parameter's gradient, to which autograd adds; it is created as zeros if there is none yet."""
    if weight_vD.grad is None:
        weight_vD.grad = torch.zeros_like(weight_vD)
    return weight_vD.grad
