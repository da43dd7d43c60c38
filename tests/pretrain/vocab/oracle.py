"""Dense float64 truth of the loss, and its comparison with the results of the ranks."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing import assert_close

from pretrain.vocab import VocabShard, vocab_parallel_linear_cross_entropy
from tests.pretrain.helpers import padded_rows
from tests.ranks import run_ranks

WIDTH = 6
OPTIONS: dict[str, dict] = {
    "plain": {},
    "z_loss": {"z_loss": 0.1},
    "smoothing": {"label_smoothing": 0.2},
    "softcap": {"softcap": 1.5},
    "z_loss, smoothing": {"z_loss": 0.1, "label_smoothing": 0.2},
    "z_loss, softcap": {"z_loss": 0.1, "softcap": 1.5},
    "smoothing, softcap": {"label_smoothing": 0.2, "softcap": 1.5},
    "all": {"z_loss": 0.1, "label_smoothing": 0.2, "softcap": 1.5},
}


def dense(hidden: Tensor, weight: Tensor, targets: Tensor, factors: Tensor, options: dict) -> dict[str, Tensor]:
    """Loss and gradients by autograd on materialised logits; `factors` weight each token's loss."""
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = hidden @ weight.T
    if "softcap" in options:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    losses = torch.nn.functional.cross_entropy(
        logits, targets, reduction="none", label_smoothing=options.get("label_smoothing", 0.0)
    )
    lse = logits.logsumexp(-1)
    losses = losses + torch.where(targets >= 0, options.get("z_loss", 0.0) * lse.square(), 0.0)
    (losses * factors).sum().backward()
    assert hidden.grad is not None and weight.grad is not None
    return {
        "losses": losses.detach(),
        "lse": lse.detach(),
        "entropy": torch.distributions.Categorical(logits=logits.detach()).entropy(),
        "correct": logits.argmax(-1) == targets,
        "dhidden": hidden.grad,
        "dweight": weight.grad,
    }


def problem(counts: Sequence[int], vocab_size: int, ignored: str, dtype: torch.dtype = torch.float64):
    """Hidden, weight [V, D], targets for all tokens of all ranks; `counts` is each rank's number of tokens."""
    generator = torch.Generator().manual_seed(vocab_size + sum(counts))
    hidden = torch.randn(sum(counts), WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab_size, WIDTH, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab_size, (sum(counts),), generator=generator)
    if ignored == "some":
        targets[::3] = -100
    elif ignored == "first rank":
        targets[: counts[0]] = -100
    elif ignored == "all":
        targets[:] = -100
    return hidden.to(dtype), weight.to(dtype), targets


@dataclass(frozen=True)
class Case:
    """One call on every rank."""

    counts: tuple[int, ...]  # tokens of each rank
    vocab_size: int = 37
    multiple: int = 4
    ignored: str = "some"
    tokens: str = "distinct"
    reduction: str = "sum"
    factor: str = "one"  # what multiplies the losses: one, a number per rank, or a number per token
    main_grad: bool = False
    chunk_tokens: int = 5
    ignore_index: int = -100
    size: float = 1.0  # factor of the hidden states
    options: dict = field(default_factory=dict)

    def problem(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns hidden, weight and targets; -100 for every ignored target."""
        hidden, weight, targets = problem(self.counts, self.vocab_size, self.ignored)
        return self.size * hidden, weight, targets.where(targets != self.ignore_index, -100)

    def factors(self) -> Tensor:
        """Returns the upstream gradient of each token's loss."""
        total = sum(self.counts)
        if self.factor == "one":
            return torch.ones(total, dtype=torch.float64)
        if self.factor == "rank":  # every rank divides by its own number
            return torch.cat([torch.full((n,), 1.0 / (2 + i), dtype=torch.float64) for i, n in enumerate(self.counts)])
        return torch.linspace(0.1, 2.0, total, dtype=torch.float64)

    def slice_of(self, rank: int) -> slice:
        if self.tokens == "replicated":
            return slice(None)
        return slice(sum(self.counts[:rank]), sum(self.counts[: rank + 1]))


def rank_losses(rank, world, cases):
    return [rank_loss(rank, world, case) for case in cases]


def rank_loss(rank, world, case):
    hidden, weight, targets = case.problem()
    targets = targets.where(targets >= 0, case.ignore_index)
    shard = VocabShard.of(rank, world, case.vocab_size, case.multiple)
    mine = case.slice_of(rank)
    x, y, factors = hidden[mine].clone().requires_grad_(), targets[mine], case.factors()[mine]
    w = padded_rows(weight, shard).requires_grad_()
    options: dict = dict(case.options)
    if case.main_grad:
        options["main_grad_vD"] = torch.zeros_like(w)
    out = vocab_parallel_linear_cross_entropy(
        x,
        w,
        y,
        shard=shard,
        group=dist.group.WORLD,
        tokens=case.tokens,
        reduction=case.reduction,
        chunk_tokens=case.chunk_tokens,
        ignore_index=case.ignore_index,
        **options,
    )
    if case.reduction == "none":
        (out.loss * factors).sum().backward()
    elif case.main_grad or not len(factors):
        out.loss.backward()
    else:
        (out.loss * factors[0]).backward()
    dweight = options["main_grad_vD"] if case.main_grad else w.grad
    assert (w.grad is None) == case.main_grad
    assert (dweight[shard.valid_rows :] == 0).all(), "padding rows got a gradient"
    return {
        "loss": out.loss.detach(),
        "n_tokens": int(out.n_tokens),
        "lse": out.lse,
        "entropy": out.entropy,
        "correct": out.correct,
        "dhidden": x.grad,
        "dweight": dweight,
        "rows": (shard.start, shard.start + shard.valid_rows),
    }


def check(world: int, *cases: Case) -> None:
    """Compares every case on `world` ranks with the dense truth."""
    results = run_ranks(world, rank_losses, cases)
    near = {"rtol": 1e-10, "atol": 1e-10}
    for i, case in enumerate(cases):
        hidden, weight, targets = case.problem()
        truth = dense(hidden, weight, targets, case.factors(), case.options)
        for rank in range(world):
            result, mine = results[rank][i], case.slice_of(rank)
            loss = truth["losses"][mine]
            note = {"msg": lambda text, case=case, rank=rank: f"rank {rank} of {case}: {text}"}
            assert_close(result["loss"], loss if case.reduction == "none" else loss.sum(), **near, **note)
            assert result["n_tokens"] == int((targets[mine] >= 0).sum())
            for key in ("lse", "entropy", "dhidden"):
                assert_close(result[key], truth[key][mine], **near, **note)
            assert torch.equal(result["correct"], truth["correct"][mine])
            start, stop = result["rows"]
            assert_close(result["dweight"][: stop - start], truth["dweight"][start:stop], **near, **note)
