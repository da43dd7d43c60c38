"""The kernels against the definitions in `Kernels`, and against each other.

Triton's run on a GPU where there is one, else under Triton's interpreter.
"""

import importlib.util
import os

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

from pretrain.vocab import VocabShard, vocab_parallel_linear_cross_entropy
from pretrain.vocab.kernels import Kernels, choose_kernels
from pretrain.vocab.kernels.base import accurate_dtype
from pretrain.vocab.kernels.torch import TorchKernels
from tests.pretrain.vocab.oracle import OPTIONS, dense

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH, ALL = 24, ("logit_sum", "weighted", "best")
NEEDS_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
NEEDS_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU: Triton's compiled kernels were not run")


def build(name: str) -> Kernels:
    """Kernels with small slabs and blocks, so that there are several of each."""
    if name == "torch":
        return TorchKernels(slab_bytes=3 * 37 * 8)
    from pretrain.vocab.kernels.triton import TritonKernels

    return TritonKernels(slab_bytes=3 * 37 * 8, columns=16)


@pytest.fixture(params=["torch", pytest.param("triton", marks=NEEDS_TRITON)])
def kernels(request) -> Kernels:
    return build(request.param)


def problem(v: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Returns hidden [m, D], weight [v, D] and the targets' rows, with duplicates and rows of other shards."""
    generator = torch.Generator().manual_seed(v)
    hidden = torch.randn(11, WIDTH, generator=generator, dtype=torch.float64)
    weight = torch.randn(v, WIDTH, generator=generator, dtype=torch.float64)
    rows = torch.randint(v, (11,), generator=generator) if v else torch.full((11,), -1)
    rows[::4] = -1
    rows[5:8] = rows[5]
    return hidden.to(DEVICE, dtype), weight.to(DEVICE, dtype), rows.to(DEVICE)


def logits_of(hidden: Tensor, weight: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Returns z and dz/du, dense."""
    logits = hidden @ weight.T
    if softcap is None:
        return logits, torch.ones_like(logits)
    tanh = torch.tanh(logits / softcap)
    return softcap * tanh, 1 - tanh.square()


def without_targets(factors: Tensor, rows: Tensor) -> Tensor:
    mine = (rows >= 0).nonzero().squeeze(1)
    factors = factors.clone()
    factors[mine, rows[mine]] = 0
    return factors


def near(dtype: torch.dtype) -> dict[str, float]:
    return {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("v", [37, 64, 1])
def test_exponentials_match_definition(kernels, v, softcap, dtype):
    hidden, weight, rows = problem(v, dtype)
    target = kernels.target_logits(hidden, weight, rows)
    z, slope = logits_of(hidden, weight, softcap)
    factors = kernels.empty_factors(hidden, len(hidden), v)
    statistics = kernels.exponentials(hidden, weight, rows, target, softcap, factors, ALL, True)
    exponentials = (z - z.amax(1, keepdim=True)).exp()
    expected = {
        "max": z.amax(1),
        "sum": exponentials.sum(1),
        "logit_sum": z.sum(1),
        "weighted": (z * exponentials).sum(1),
        "best": z.argmax(1).to(dtype),
    }
    assert statistics.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(statistics[name], expected[name], **near(dtype))
    torch.testing.assert_close(factors, without_targets(exponentials * slope, rows), **near(dtype))
    silent = kernels.exponentials(hidden, weight, rows, target, softcap, factors, (), False)
    assert silent.keys() == {"max", "sum"} and all(torch.equal(silent[name], statistics[name]) for name in silent)


def test_exact_target_logit_enters_the_statistics(kernels):
    hidden, weight, rows = problem(37)
    target = torch.where(rows >= 0, 100.0, 0.0).double()
    factors = kernels.empty_factors(hidden, len(hidden), 37)
    statistics = kernels.exponentials(hidden, weight, rows, target, None, factors, ("best",), True)
    assert (statistics["max"] == 100).equal(rows >= 0)
    assert torch.equal(statistics["best"].long()[rows >= 0], rows[rows >= 0])


def test_ties_go_to_the_lowest_row(kernels):
    hidden, _, rows = problem(37)
    weight = torch.zeros(37, WIDTH, dtype=torch.float64, device=DEVICE)
    target = torch.zeros_like(hidden[:, 0])
    factors = kernels.empty_factors(hidden, len(hidden), 37)
    assert (kernels.exponentials(hidden, weight, rows, target, None, factors, ("best",), False)["best"] == 0).all()


def test_shard_without_rows_has_a_finite_floor(kernels):
    hidden, weight, rows = problem(0)
    target = kernels.target_logits(hidden, weight, rows)
    assert (target == 0).all()
    factors = kernels.empty_factors(hidden, len(hidden), 0)
    statistics = kernels.exponentials(hidden, weight, rows, target, 2.0, factors, ALL, True)
    assert (statistics["max"] < -1e38).all() and statistics["max"].isfinite().all()
    assert (statistics["sum"] == 0).all() and (kernels.times_weight(factors, weight) == 0).all()


@pytest.mark.parametrize("softcap", [None, 2.5])
def test_dlogits_match_definition(kernels, softcap):
    hidden, weight, rows = problem(37)
    z, slope = logits_of(hidden, weight, softcap)
    lse, z_loss_gain = z.logsumexp(1), torch.linspace(0.5, 2.0, len(z), dtype=z.dtype, device=DEVICE)
    factors = kernels.empty_factors(hidden, len(hidden), 37)
    kernels.dlogits(hidden, weight, rows, softcap, factors, lse, z_loss_gain, 0.01)
    expected = (z_loss_gain.unsqueeze(1) * z.softmax(1) - 0.01) * slope
    torch.testing.assert_close(factors, without_targets(expected, rows), **near(torch.float64))


def test_matmuls_match_definition(kernels):
    hidden, weight, rows = problem(37)
    factors = kernels.empty_factors(hidden, len(hidden), 37).copy_(torch.rand(11, 37))
    scale, target = torch.rand(2, 11, dtype=torch.float64, device=DEVICE)
    mine = (rows >= 0).nonzero().squeeze(1)
    product = kernels.times_weight(factors, weight)
    torch.testing.assert_close(product, factors @ weight, **near(torch.float64))
    expected = scale.unsqueeze(1) * product
    expected[mine] += target[mine].unsqueeze(1) * weight[rows[mine]]
    total, scaled = kernels.scale(product, scale, weight, torch.where(rows >= 0, target, 0), hidden, rows)
    torch.testing.assert_close(total, expected, **near(torch.float64))
    torch.testing.assert_close(scaled, scale.unsqueeze(1) * hidden, **near(torch.float64))
    gradient = torch.ones_like(weight)
    kernels.add_weight_gradient(gradient, factors, scaled, target, hidden, rows)
    expected = 1 + factors.T @ scaled
    expected.index_add_(0, rows[mine], target[mine].unsqueeze(1) * hidden[mine])
    torch.testing.assert_close(gradient, expected, **near(torch.float64))


def gradients(name: str, dtype: torch.dtype, **options):
    """Returns loss, dX and dW of the whole loss on these kernels."""
    hidden, weight, targets = problem(37, dtype)
    targets = targets.where(targets >= 0, -100)
    hidden.requires_grad_()
    main_grad = torch.zeros_like(weight, dtype=accurate_dtype(dtype))
    out = vocab_parallel_linear_cross_entropy(
        hidden,
        weight,
        targets,
        shard=VocabShard.of(0, 1, 37, 1),
        chunk_tokens=4,
        main_grad_vD=main_grad,
        kernels=build(name),
        **options,
    )
    out.loss.backward()
    return out.loss.detach(), out.lse, out.entropy, out.correct, hidden.grad, main_grad


@NEEDS_TRITON
@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_triton_loss_matches_torch(smoothing, softcap):
    options = {"label_smoothing": smoothing, "softcap": softcap, "z_loss": 0.1}
    both = (gradients(name, torch.float64, **options) for name in ("torch", "triton"))
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other, **near(torch.float64))


@NEEDS_TRITON
def test_both_losses_in_bf16_are_near_float64(monkeypatch):
    """Triton keeps the logits in fp32, torch rounds them: both are near the truth in float64."""
    if DEVICE == "cpu":  # its matmuls cannot return fp32
        from pretrain.vocab.kernels import triton

        monkeypatch.setattr(triton, "_multiply", lambda a, b, out: torch.mm(a.to(out.dtype), b.to(out.dtype), out=out))
        monkeypatch.setattr(triton, "_multiply_add", lambda out, a, b: out.addmm_(a.to(out.dtype), b.to(out.dtype)))
    truth = gradients("torch", torch.float64)
    for name, tolerance in (("torch", 2e-2), ("triton", 5e-3)):
        for value, expected in zip(gradients(name, torch.bfloat16), truth, strict=True):
            if value.dtype != torch.bool:
                assert (value.double() - expected).norm() <= tolerance * expected.norm()


def test_repeated_calls_return_the_same_bits(kernels):
    hidden = problem(37)[0]
    assert kernels.empty_factors(hidden, 11, 37).stride() == (64, 1)
    name = "torch" if isinstance(kernels, TorchKernels) else "triton"
    for once, again in zip(gradients(name, torch.float32), gradients(name, torch.float32), strict=True):
        assert torch.equal(once, again)


def large(vocab_size: int, tokens: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns a problem in bf16 for a GPU; a third of the targets is one frequent row."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator, device=DEVICE).bfloat16()
    weight = (torch.randn(vocab_size, width, generator=generator, device=DEVICE) / width**0.5).bfloat16()
    targets = torch.randint(vocab_size, (tokens,), generator=generator, device=DEVICE)
    targets[::3], targets[1::7] = 11, -100
    return hidden, weight, targets


@NEEDS_GPU
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_gpu_options_are_near_float64(options):
    """50,257 rows are not a multiple of any vector."""
    hidden, weight, targets = large(50_257, 1000, 256)
    truth = dense(hidden.double(), weight.double(), targets, torch.ones(1000, device=DEVICE).double(), options)
    x, main_grad = hidden.clone().requires_grad_(), torch.zeros_like(weight, dtype=torch.float32)
    shard = VocabShard.of(0, 1, 50_257, 1)
    out = vocab_parallel_linear_cross_entropy(x, weight, targets, shard=shard, main_grad_vD=main_grad, **options)
    out.loss.backward()
    for made, expected in (
        (out.loss, truth["losses"].sum()),
        (out.lse, truth["lse"]),
        (out.entropy, truth["entropy"]),
        (x.grad, truth["dhidden"]),
        (main_grad, truth["dweight"]),
    ):
        assert (made.double() - expected).norm() <= 5e-3 * expected.norm()


@NEEDS_GPU
def test_gpu_offsets_may_exceed_2_to_31():
    tokens, vocab_size = 17_000, 131_072
    hidden, weight, targets = large(vocab_size, tokens, 64)
    shard = VocabShard.of(0, 1, vocab_size, 1)
    x, main_grad = hidden.clone().requires_grad_(), torch.zeros_like(weight, dtype=torch.float32)
    out = vocab_parallel_linear_cross_entropy(
        x, weight, targets, shard=shard, main_grad_vD=main_grad, chunk_tokens=tokens
    )
    out.loss.backward()
    last = slice(tokens - 300, tokens)
    ones = torch.ones(300, device=DEVICE).double()
    truth = dense(hidden[last].double(), weight.double(), targets[last], ones, {})
    torch.testing.assert_close(out.lse[last].double(), truth["lse"], rtol=1e-3, atol=1e-3)
    assert (x.grad[last].double() - truth["dhidden"]).norm() <= 5e-3 * truth["dhidden"].norm()


@NEEDS_GPU
def test_gpu_never_makes_the_host_wait():
    hidden, weight, targets = large(50_257, 1000, 256)
    x, main_grad = hidden.clone().requires_grad_(), torch.zeros_like(weight, dtype=torch.float32)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = vocab_parallel_linear_cross_entropy(
            x, weight, targets, shard=VocabShard.of(0, 1, 50_257, 1), main_grad_vD=main_grad, max_tokens_per_rank=1000
        )
        out.loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@NEEDS_GPU
def test_gpu_uses_triton():
    assert type(choose_kernels(torch.device("cuda"))).__name__ == "TritonKernels"


def test_cpu_uses_torch():
    assert isinstance(choose_kernels(torch.device("cpu")), TorchKernels)
