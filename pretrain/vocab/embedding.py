"""The owner of the token-embedding matrix: one parameter for both uses (tied), or two (untied), or one, then two."""

import math
from collections.abc import Container
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .kernels import choose_kernels
from .lookup import LookupPlan, vocab_parallel_lookup
from .loss import LARGEST_VOCABULARY, VocabLoss, vocab_parallel_linear_cross_entropy
from .shard import VocabShard


@dataclass
class VocabConfig:
    """The vocabulary and how its matrix is held.

    size: rows; null takes the tokenizer's. multiple: the matrix is padded to a multiple of it. parallel: ranks
    that share one copy of the matrix; "auto" chooses by an estimate, see placement.py. tie: the run begins with one
    matrix for input and output, or with two. untie_at: the step after which a tied matrix is split in two, each a copy
    of it, moments included; null: never. embed_scale: factor of what the lookup hands out (Gemma's is √width).
    input_grad_scale: factor of the gradient that the rows get through the lookup; 0: they are trained as output alone.
    head_memory_mib: what the loss may hold at once, besides the gradient of its rows, and so how many tokens it works
    on at a time; null: 64 on a CPU, 896 on a GPU, or a quarter of that gradient where it is more. More gains little
    once 512 tokens fit (on a GPU: 2,048).
    """

    size: int | None = None
    multiple: int = 128
    parallel: str = "auto"
    tie: str = "tied"
    untie_at: int | None = None
    embed_scale: float = 1.0
    input_grad_scale: float = 1.0
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    softcap: float | None = None
    head_memory_mib: int | None = None

    def __post_init__(self) -> None:
        if self.size is not None and not 1 <= self.size <= LARGEST_VOCABULARY:
            raise ValueError(f"vocab.size={self.size} must be in [1, {LARGEST_VOCABULARY}] (or null: the tokenizer's)")
        if self.multiple < 1:
            raise ValueError(f"vocab.multiple={self.multiple} must be at least 1")
        if self.parallel != "auto" and not (self.parallel.isdecimal() and int(self.parallel) >= 1):
            raise ValueError(f"vocab.parallel={self.parallel} must be auto or a positive number of ranks")
        if self.tie not in ("tied", "untied"):
            raise ValueError(f"vocab.tie={self.tie} must be tied or untied")
        if self.untie_at is not None and self.untie_at < 1:
            raise ValueError(f"vocab.untie_at={self.untie_at} must be at least 1 (or null: never)")
        if self.untie_at is not None and self.tie != "tied":
            raise ValueError(f"vocab.untie_at={self.untie_at} needs vocab.tie=tied: two matrices cannot be split")
        if not 0 < self.embed_scale < math.inf:
            raise ValueError(f"vocab.embed_scale={self.embed_scale} must be positive")
        if not 0 <= self.input_grad_scale < math.inf:
            raise ValueError(f"vocab.input_grad_scale={self.input_grad_scale} must be a number of at least 0")
        if not 0 <= self.z_loss < math.inf:
            raise ValueError(f"vocab.z_loss={self.z_loss} must be a number of at least 0")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"vocab.label_smoothing={self.label_smoothing} must be in [0, 1)")
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(f"vocab.softcap={self.softcap} must be positive (or null: no cap)")
        if self.head_memory_mib is not None and self.head_memory_mib < 1:
            raise ValueError(f"vocab.head_memory_mib={self.head_memory_mib} must be at least 1 (or null: by device)")

    @property
    def matrices(self) -> int:
        """How many there are when most are."""
        return 1 if self.untied_at(None) is None else 2

    def untied_at(self, step: int | None) -> int | None:
        """The step after which the matrices of a checkpoint of `step` were split, 0 where they never were one; None
        where they still are one. step=None: of one at the end of time.
        """
        if self.tie == "untied":
            return 0
        return self.untie_at if self.untie_at is not None and (step is None or self.untie_at < step) else None


class VocabParallelEmbedding(nn.Module):
    """This rank's rows of the matrix: `weight` [v, D], and `head_weight` [v, D] where it is untied, or was split.

    Both are main weights of `dtype`, and no engine sees them. `compute_dtype` is what the lookup hands out and
    what the loss multiplies in. `group` are the ranks of the shard's world; None where that is one.
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
        super().__init__()
        self.config, self.shard, self.group, self.compute_dtype = config, shard, group, compute_dtype

        def rows(name: str) -> nn.Parameter:
            return nn.Parameter(shard.initial_rows(name, seed, width, std).to(device, dtype))

        self.weight = rows("embedding.weight")
        self.head_weight = rows("head.weight") if config.tie == "untied" else None
        self.kernels = choose_kernels(self.weight.device)
        self.input_grad_vD: Tensor | None = None  # where given, backward adds the lookup's gradient to it as well

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

    def was_untied(self, tensors: Container[str]) -> bool:
        """Whether a checkpoint with tensors of these names has a second matrix, and mine is one that is to be split."""
        return self.head_weight is None and self.config.untie_at is not None and "head.weight" in tensors

    def lookup(self, tokens_BT: Tensor, plan: LookupPlan | None = None) -> Tensor:
        """embed_scale · hidden [B, T, D] in the compute dtype; backward adds to the rows' `grad`.

        Plan and collectives: see `vocab_parallel_lookup`.
        """
        hidden_ND = vocab_parallel_lookup(
            tokens_BT.flatten(),
            self.weight,
            shard=self.shard,
            group=self.group,
            dtype=self.compute_dtype,
            plan=plan,
            main_grad=self._input_grads,
        )
        if self.config.embed_scale != 1:
            hidden_ND = hidden_ND * self.config.embed_scale
        if self.config.input_grad_scale != 1 and hidden_ND.requires_grad:
            hidden_ND.register_hook(lambda dhidden_ND: dhidden_ND * self.config.input_grad_scale)
        return hidden_ND.unflatten(0, tokens_BT.shape)

    def loss(
        self, hidden_BTD: Tensor, targets_BT: Tensor, scale: float | None = None, metrics: bool = False
    ) -> VocabLoss:
        """Sum of the loss over this rank's targets, of which every rank brings as many.

        With `scale` it is multiplied by it, and the gradient of the rows is in their `grad` when this returns: to be
        followed by one backward() on the loss as it is. `metrics` and collectives: see
        `vocab_parallel_linear_cross_entropy`.
        """
        rows = self.output_weight
        final = scale is not None and torch.is_grad_enabled()
        return vocab_parallel_linear_cross_entropy(
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
            max_tokens_per_rank=targets_BT.numel(),
            scale=1.0 if scale is None else scale,
            main_grad_vD=_main_grad(rows) if final else None,
            kernels=self.kernels,
        )

    def _input_grads(self) -> list[Tensor]:
        return [_main_grad(self.weight), *([] if self.input_grad_vD is None else [self.input_grad_vD])]

    def named_rows(self) -> dict[str, nn.Parameter]:
        """The parameters by their names in a checkpoint, those of the unsharded model."""
        rows = {"embedding.weight": self.weight}
        if self.head_weight is not None:
            rows["head.weight"] = self.head_weight
        return rows


def _main_grad(weight_vD: nn.Parameter) -> Tensor:
    """The parameter's gradient, as autograd accumulates it; zeros where there is none yet."""
    if weight_vD.grad is None:
        weight_vD.grad = torch.zeros_like(weight_vD)
    return weight_vD.grad
