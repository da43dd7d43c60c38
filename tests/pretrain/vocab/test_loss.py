"""The sharded loss against a dense float64 truth."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from pretrain.vocab import VocabShard, vocab_parallel_linear_cross_entropy
from pretrain.vocab.chunks import chunk_budget
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
    """One call on every rank. counts: tokens of each rank; factor: what multiplies the losses upstream."""

    counts: tuple[int, ...]
    vocab_size: int = 37
    multiple: int = 4
    ignored: str = "some"
    tokens: str = "distinct"
    reduction: str = "sum"
    factor: str = "one"
    main_grad: bool = False
    chunk_tokens: int = 5
    options: dict = field(default_factory=dict)

    def factors(self) -> Tensor:
        """The upstream gradient of each token's loss."""
        total = sum(self.counts)
        if self.factor == "one":
            return torch.ones(total, dtype=torch.float64)
        if self.factor == "rank":  # every rank divides by a number of its own
            return torch.cat([torch.full((n,), 1.0 / (2 + i), dtype=torch.float64) for i, n in enumerate(self.counts)])
        return torch.linspace(0.1, 2.0, total, dtype=torch.float64)

    def slice_of(self, rank: int) -> slice:
        if self.tokens == "replicated":
            return slice(None)
        return slice(sum(self.counts[:rank]), sum(self.counts[: rank + 1]))


def rank_losses(rank, world, cases):
    return [rank_loss(rank, world, case) for case in cases]


def rank_loss(rank, world, case):
    hidden, weight, targets = problem(case.counts, case.vocab_size, case.ignored)
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
    """Every case on that many ranks against the dense truth."""
    results = run_ranks(world, rank_losses, cases)
    near = {"rtol": 1e-10, "atol": 1e-10}
    for i, case in enumerate(cases):
        hidden, weight, targets = problem(case.counts, case.vocab_size, case.ignored)
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


REDUCTIONS = [("sum", "one"), ("sum", "rank"), ("none", "token")]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_distinct_tokens(world):
    counts = (7, 12, 0, 5)[:world]  # unequal, one rank without any
    check(world, *(Case(counts, reduction=r, factor=f, options=o) for r, f in REDUCTIONS for o in OPTIONS.values()))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_replicated_tokens(world):
    kinds = [("sum", "one"), ("none", "token")]
    cases = (
        Case((13,), tokens="replicated", reduction=r, factor=f, options=o) for r, f in kinds for o in OPTIONS.values()
    )
    check(world, *cases)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_main_gradient_is_complete_after_forward(world):
    counts = (7, 12, 0)[:world]
    check(world, *(Case(counts, main_grad=True, options=o) for o in OPTIONS.values()))


@pytest.mark.parametrize("world", [2, 4])
def test_ignored_targets_and_ranks_without_tokens(world):
    counts = (6, 9, 4, 3)[:world]
    kinds = ("none", "some", "first rank", "all")
    cases = [Case(counts, ignored=kind, reduction=r, options=OPTIONS["all"]) for kind in kinds for r in ("sum", "none")]
    check(world, *cases)


def test_a_group_without_any_token():
    cases = [Case((0, 0)), Case((0, 0), reduction="none"), Case((0, 0), main_grad=True)]
    for results in run_ranks(2, rank_losses, cases):
        for result in results:
            assert result["loss"].sum() == 0 and result["n_tokens"] == 0
            assert len(result["dhidden"]) == 0 and (result["dweight"] == 0).all()


def test_short_and_empty_shards():
    sizes = [(5, 1), (3, 1), (3, 8), (130, 128)]
    cases = [
        Case((3, 2, 4, 1), vocab_size=v, multiple=m, ignored="none", tokens=t, reduction=r, options=o)
        for v, m in sizes
        for o in (OPTIONS["plain"], OPTIONS["all"])
        for t, r in (("distinct", "sum"), ("distinct", "none"))
    ]
    check(4, *cases)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_any_problem_on_several_ranks(world):
    """Cases drawn at random, the same on all ranks."""
    draw = random.Random(world)
    cases = [
        Case(
            counts=(draw.randint(1, 12), *(draw.randint(0, 12) for _ in range(world - 1))),
            vocab_size=draw.randint(1, 60),
            multiple=draw.choice([1, 2, 8, 16]),
            ignored=draw.choice(["none", "some", "first rank", "all"]),
            reduction=draw.choice(["sum", "none"]),
            chunk_tokens=draw.randint(1, 40),
            options=draw.choice(list(OPTIONS.values())),
        )
        for _ in range(40)
    ]
    check(world, *cases)


def alone(hidden, weight, targets, **options):
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    shard = VocabShard.of(0, 1, len(weight), 1)
    out = vocab_parallel_linear_cross_entropy(x, w, targets, shard=shard, **options)
    out.loss.sum().backward()
    return out, x.grad, w.grad


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 20),
    vocab_size=st.integers(1, 50),
    chunk=st.integers(1, 25),
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    z_loss=st.sampled_from([0.0, 0.01]),
    smoothing=st.sampled_from([0.0, 0.3]),
    softcap=st.sampled_from([None, 20.0]),
    seed=st.integers(0, 2**31),
)
def test_any_problem_on_one_process(tokens, vocab_size, chunk, scale, z_loss, smoothing, softcap, seed):
    generator = torch.Generator().manual_seed(seed)
    hidden = scale * torch.randn(tokens, 3, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab_size, 3, generator=generator, dtype=torch.float64)
    targets = torch.randint(-1, vocab_size, (tokens,), generator=generator)
    targets[targets < 0] = -100
    options = {"z_loss": z_loss, "label_smoothing": smoothing} | ({"softcap": softcap} if softcap else {})
    truth = dense(hidden, weight, targets, torch.ones(tokens, dtype=torch.float64), options)
    out, dhidden, dweight = alone(hidden, weight, targets, chunk_tokens=chunk, **options)
    near = {"rtol": 1e-9, "atol": 1e-9}
    assert_close(out.loss, truth["losses"].sum(), **near)
    assert_close(dhidden, truth["dhidden"], **near)
    assert_close(dweight, truth["dweight"], **near)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits(size):
    weight = torch.tensor([[size], [0.0], [-size]])
    out, dhidden, dweight = alone(torch.ones(3, 1), weight, torch.tensor([0, 1, 2]))
    truth = dense(torch.ones(3, 1).double(), weight.double(), torch.tensor([0, 1, 2]), torch.ones(3).double(), {})
    assert_close(out.loss.double(), truth["losses"].sum())
    assert_close(dhidden.double(), truth["dhidden"])
    assert_close(dweight.double(), truth["dweight"])


def test_confident_targets_in_bf16():
    """The target's entry stays out of the bf16 matmuls: dW is better than 1e-3 where p_y is about 0.996."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 64, generator=generator).bfloat16()
    targets = torch.randint(512, (256,), generator=generator)
    hidden = (0.18 * weight[targets].float() + 0.02 * torch.randn(256, 64, generator=generator)).bfloat16()
    truth = dense(hidden.double(), weight.double(), targets, torch.ones(256).double(), {})
    main = weight.float().requires_grad_()
    out = vocab_parallel_linear_cross_entropy(hidden, main, targets, shard=VocabShard.of(0, 1, 512))
    out.loss.backward()
    assert main.grad is not None and main.grad.dtype == torch.float32
    assert 0.9 < truth["losses"].neg().exp().mean() < 0.9999
    error = (main.grad.double() - truth["dweight"]).norm() / truth["dweight"].norm()
    logits = hidden @ weight.T  # the textbook: probabilities minus one, rounded to bf16
    probabilities = logits.float().softmax(-1)
    probabilities[torch.arange(256), targets] -= 1
    textbook = (probabilities.bfloat16().T @ hidden).double() - truth["dweight"]
    assert error < 1e-3 < textbook.norm() / truth["dweight"].norm()


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_no_loss_in_bf16_is_below_zero(size):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 8, generator=generator).bfloat16()
    targets = torch.arange(50)
    out, dhidden, dweight = alone(size * weight, weight, targets, reduction="none")
    assert (out.loss >= 0).all() and dhidden.isfinite().all() and dweight.isfinite().all()


class Matmuls(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_three_matmuls_and_one_without_gradients(options):
    hidden, weight, targets = problem([9], 37, "some")
    waits = {"label_smoothing", "softcap"} <= options.keys()  # for the normaliser: these logits are made twice
    with Matmuls() as matmuls:
        out, _, _ = alone(hidden, weight, targets, **options)
    assert matmuls.count == 3 + waits
    with Matmuls() as matmuls, torch.no_grad():
        silent = vocab_parallel_linear_cross_entropy(
            hidden, weight, targets, shard=VocabShard.of(0, 1, 37, 1), **options
        )
    assert matmuls.count == 1
    assert torch.equal(silent.loss, out.loss.detach())
    with Matmuls() as matmuls:
        alone(hidden, weight, targets, reduction="none", **options)
    assert matmuls.count == 4


def test_metrics_are_left_out_when_nobody_asks():
    hidden, weight, targets = problem([9], 37, "some")
    out, dhidden, dweight = alone(hidden, weight, targets)
    lean, lean_dhidden, lean_dweight = alone(hidden, weight, targets, metrics=False)
    assert lean.entropy is None and lean.correct is None
    assert torch.equal(lean.loss, out.loss) and torch.equal(lean.lse, out.lse)
    assert torch.equal(lean_dhidden, dhidden) and torch.equal(lean_dweight, dweight)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_backward_twice(reduction):
    """The second time the gradients are made anew."""
    hidden, weight, targets = problem([9], 37, "some")
    x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    shard = VocabShard.of(0, 1, 37, 1)
    loss = vocab_parallel_linear_cross_entropy(x, w, targets, shard=shard, reduction=reduction).loss.sum()
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    for again, once in zip(torch.autograd.grad(3 * loss, (x, w)), first, strict=True):
        assert_close(again, 3 * once, rtol=1e-12, atol=1e-12)


def with_main_grad(hidden, weight, targets, main_grad, **options):
    x = hidden.clone().requires_grad_()
    shard = VocabShard.of(0, 1, len(weight), 1)
    return vocab_parallel_linear_cross_entropy(x, weight, targets, shard=shard, main_grad_vD=main_grad, **options), x


def test_the_main_gradient_adds_up_over_micro_batches():
    hidden, weight, targets = problem([20], 37, "some")
    truth = dense(hidden, weight, targets, torch.full((20,), 0.05, dtype=torch.float64), {})
    main_grad = torch.zeros_like(weight)
    total = 0.0
    for part in (slice(0, 7), slice(7, 20)):
        out, x = with_main_grad(hidden[part], weight, targets[part], main_grad, scale=0.05)
        out.loss.backward()
        assert_close(x.grad, truth["dhidden"][part], rtol=1e-10, atol=1e-10)
        total += out.loss.detach()
    assert_close(total, 0.05 * truth["losses"].sum())
    assert_close(main_grad, truth["dweight"], rtol=1e-10, atol=1e-10)


def test_the_main_gradient_is_for_one_backward_on_the_loss_as_it_is():
    hidden, weight, targets = problem([9], 37, "some")
    out, _ = with_main_grad(hidden, weight, targets, torch.zeros_like(weight))
    with pytest.raises(ValueError, match=r"not for 0\.5 times it: use scale"):
        (out.loss * 0.5).backward()
    out, _ = with_main_grad(hidden, weight, targets, torch.zeros_like(weight))
    out.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward ran already"):
        out.loss.backward()
    with pytest.raises(ValueError, match='main_grad_vD needs reduction="sum"'):
        with_main_grad(hidden, weight, targets, torch.zeros_like(weight), reduction="none")
    with pytest.raises(ValueError, match=r"dtype torch.float32.*torch.float64"):
        with_main_grad(hidden, weight, targets, torch.zeros_like(weight).float())


def test_a_chunk_keeps_to_its_budget():
    """The factors, alone most of what is held, of as many tokens as fit; one token where none does."""
    shard = VocabShard.of(0, 4, 131_072)
    tokens = chunk_budget(shard, 1024, torch.bfloat16, 64)
    assert 0.7 * 64 * 2**20 < tokens * shard.rows * 2 < 64 * 2**20
    assert chunk_budget(shard, 1024, torch.bfloat16, 128) in (2 * tokens, 2 * tokens + 1)
    assert chunk_budget(VocabShard.of(0, 1, 2**24), 1024, torch.float32, 1) == 1


@pytest.mark.parametrize("bad", [37, -1, 1000])
def test_a_target_outside_the_vocabulary_is_named(bad):
    hidden, weight, targets = problem([9], 37, "none")
    targets[4] = bad
    with pytest.raises(ValueError, match=rf"target {bad} at position 4 .*vocab_size=37"):
        alone(hidden, weight, targets)


def test_a_weight_of_another_shard_is_named():
    hidden, weight, targets = problem([9], 37, "none")
    with pytest.raises(ValueError, match=r"weight has shape \(37, 6\).*\(40, 6\)"):
        vocab_parallel_linear_cross_entropy(hidden, weight, targets, shard=VocabShard.of(0, 1, 37, 8))
