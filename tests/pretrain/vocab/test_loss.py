"""The sharded loss against a dense float64 truth."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pretrain.vocab import VocabShard, vocab_parallel_linear_cross_entropy
from tests.ranks import run_ranks

WIDTH = 6
OPTIONS: dict[str, dict] = {
    "plain": {},
    "z_loss": {"z_loss": 0.1},
    "smoothing": {"label_smoothing": 0.2},
    "softcap": {"softcap": 1.5},
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


def problem(counts: list[int], vocab_size: int, ignored: str, dtype: torch.dtype = torch.float64):
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


def rank_loss(rank, world, counts, vocab_size, multiple, ignored, tokens, reduction, factor_kind, options):
    hidden, weight, targets = problem(counts, vocab_size, ignored)
    shard = VocabShard.of(rank, world, vocab_size, multiple)
    padded = torch.zeros(shard.padded_size, WIDTH, dtype=torch.float64)
    padded[:vocab_size] = weight
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1])) if tokens == "distinct" else slice(None)
    x, y = hidden[mine].clone().requires_grad_(), targets[mine]
    w = padded[shard.start : shard.stop].clone().requires_grad_()
    out = vocab_parallel_linear_cross_entropy(
        x, w, y, shard=shard, group=dist.group.WORLD, tokens=tokens, reduction=reduction, chunk_tokens=5, **options
    )
    factors = factors_of(factor_kind, counts, targets)[mine]
    if reduction == "none":
        (out.loss * factors).sum().backward()
    elif len(factors):
        (out.loss * factors[0]).backward()  # one factor a rank
    else:
        out.loss.backward()
    assert (w.grad[shard.valid_rows :] == 0).all(), "padding rows got a gradient"
    return {
        "loss": out.loss.detach(),
        "n_tokens": int(out.n_tokens),
        "lse": out.lse,
        "entropy": out.entropy,
        "correct": out.correct,
        "dhidden": x.grad,
        "dweight": w.grad,
        "rows": (shard.start, shard.start + shard.valid_rows),
        "mine": mine,
    }


def factors_of(kind: str, counts: list[int], targets: Tensor) -> Tensor:
    """The upstream gradient of each token's loss."""
    if kind == "one":
        return torch.ones(len(targets), dtype=torch.float64)
    if kind == "rank":  # every rank divides by a number of its own
        return torch.cat([torch.full((n,), 1.0 / (2 + i), dtype=torch.float64) for i, n in enumerate(counts)])
    return torch.linspace(0.1, 2.0, len(targets), dtype=torch.float64)


def check(world, counts, vocab_size, multiple, ignored, tokens, reduction, factor_kind, options):
    hidden, weight, targets = problem(counts, vocab_size, ignored)
    truth = dense(hidden, weight, targets, factors_of(factor_kind, counts, targets), options)
    results = run_ranks(
        world, rank_loss, counts, vocab_size, multiple, ignored, tokens, reduction, factor_kind, options
    )
    near = {"rtol": 1e-10, "atol": 1e-10}
    for result in results:
        mine = result["mine"]
        loss = truth["losses"][mine]
        torch.testing.assert_close(result["loss"], loss if reduction == "none" else loss.sum(), **near)
        assert result["n_tokens"] == int((targets[mine] >= 0).sum())
        for key in ("lse", "entropy", "dhidden"):
            torch.testing.assert_close(result[key], truth[key][mine], **near)
        assert torch.equal(result["correct"], truth["correct"][mine])
        start, stop = result["rows"]
        torch.testing.assert_close(result["dweight"][: stop - start], truth["dweight"][start:stop], **near)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("reduction,factor", [("sum", "one"), ("none", "token")])
def test_distinct_tokens(world, options, reduction, factor):
    counts = [7, 12, 0, 5][:world]  # unequal, one rank without any
    check(world, counts, 37, 4, "some", "distinct", reduction, factor, options)


@pytest.mark.parametrize("options", [OPTIONS["plain"], OPTIONS["all"]], ids=["plain", "all"])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("reduction,factor", [("sum", "one"), ("none", "token")])
def test_replicated_tokens(world, options, reduction, factor):
    check(world, [13], 37, 4, "some", "replicated", reduction, factor, options)


@pytest.mark.parametrize("ignored", ["none", "some", "first rank", "all"])
def test_ignored_targets(ignored):
    check(2, [6, 9], 37, 1, ignored, "distinct", "sum", "one", {})


def test_ranks_may_scale_their_losses_differently():
    check(3, [4, 6, 5], 37, 1, "some", "distinct", "sum", "rank", OPTIONS["all"])


@pytest.mark.parametrize("vocab_size,multiple", [(5, 1), (3, 1), (3, 8), (130, 128)])
def test_short_and_empty_shards(vocab_size, multiple):
    check(4, [3, 2, 4, 1], vocab_size, multiple, "none", "distinct", "sum", "one", OPTIONS["all"])


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
    torch.testing.assert_close(out.loss, truth["losses"].sum(), **near)
    torch.testing.assert_close(dhidden, truth["dhidden"], **near)
    torch.testing.assert_close(dweight, truth["dweight"], **near)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_logits(size):
    weight = torch.tensor([[size], [0.0], [-size]])
    out, dhidden, dweight = alone(torch.ones(3, 1), weight, torch.tensor([0, 1, 2]))
    truth = dense(torch.ones(3, 1).double(), weight.double(), torch.tensor([0, 1, 2]), torch.ones(3).double(), {})
    torch.testing.assert_close(out.loss.double(), truth["losses"].sum())
    torch.testing.assert_close(dhidden.double(), truth["dhidden"])
    torch.testing.assert_close(dweight.double(), truth["dweight"])


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


def test_no_grad_gives_the_same_loss():
    hidden, weight, targets = problem([9], 37, "some")
    out, _, _ = alone(hidden, weight, targets)
    with torch.no_grad():
        silent = vocab_parallel_linear_cross_entropy(hidden, weight, targets, shard=VocabShard.of(0, 1, 37, 1))
    assert torch.equal(silent.loss, out.loss.detach())


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
