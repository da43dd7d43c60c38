"""The kernels against the definitions in `Kernels`, and against each other.

Triton's run on a GPU where there is one, else under Triton's interpreter.
"""

import importlib.util
import os
from dataclasses import replace

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported

from pretrain.vocab import VocabShard, vocab_parallel_linear_cross_entropy
from pretrain.vocab.kernels import Kernels, choose_kernels
from pretrain.vocab.kernels.base import accurate_dtype
from pretrain.vocab.kernels.torch import TorchKernels
from pretrain.vocab.objective import Objective
from tests.pretrain.vocab.oracle import OPTIONS, dense

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH = 24
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


def statistics_of(
    kernels: Kernels,
    hidden: Tensor,
    weight: Tensor,
    rows: Tensor,
    target: Tensor,
    objective: Objective,
    factors: Tensor,
    gradients: bool = True,
) -> dict[str, Tensor]:
    """Returns the statistics by their names; fills the factors."""
    statistics = kernels.exponentials(hidden, weight, rows, target, objective, factors, gradients)
    return dict(zip(objective.statistics, statistics, strict=True))


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
    objective = Objective(v, smoothing=0.1, softcap=softcap, metrics=True)
    statistics = statistics_of(kernels, hidden, weight, rows, target, objective, factors)
    exponentials = (z - z.amax(1, keepdim=True)).exp()
    expected = {
        "shift": z.amax(1),
        "sum": exponentials.sum(1),
        "target": torch.where(rows >= 0, objective.cap(target), 0.0),
        "logit_sum": z.sum(1),
        "weighted": (z * exponentials).sum(1),
        "best": z.argmax(1).to(dtype),
    }
    assert statistics.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(statistics[name], expected[name], **near(dtype))
    torch.testing.assert_close(factors, without_targets(exponentials * slope, rows), **near(dtype))
    silent = replace(objective, smoothing=0.0, metrics=False)
    few = statistics_of(kernels, hidden, weight, rows, target, silent, factors, gradients=False)
    lse = few["shift"] + few["sum"].log()
    torch.testing.assert_close(lse, z.logsumexp(1), **near(dtype))
    assert few.keys() == {"shift", "sum", "target"} and torch.equal(few["target"], statistics["target"])


@pytest.mark.parametrize("far", [3.0, 29.0, 31.0, 700.0, 30_000.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.usefixtures("wide_matmuls")
def test_shift_suits_rows_whose_largest_logit_comes_late(kernels, dtype, far):
    """Column 36 is `far` above the others, and is not the target; Triton's blocks have 16 columns."""
    hidden = torch.ones(3, 1, device=DEVICE, dtype=dtype)
    weight = torch.zeros(37, 1, device=DEVICE, dtype=dtype)
    weight[36] = far
    rows = torch.tensor([5, -1, 36], device=DEVICE)
    target = kernels.target_logits(hidden, weight, rows)
    factors = kernels.empty_factors(hidden, 3, 37)
    statistics = statistics_of(kernels, hidden, weight, rows, target, Objective(37), factors)
    shift, total = statistics["shift"].double(), statistics["sum"].double()
    assert factors.isfinite().all() and total.isfinite().all() and (total > 0).all()
    lse = weight.double().squeeze(1).logsumexp(0).expand(3)
    torch.testing.assert_close(shift + total.log(), lse, rtol=1e-3, atol=1e-3)
    probabilities = factors.double() * (shift - lse).exp().unsqueeze(1)
    expected = without_targets((weight.double().T - lse.unsqueeze(1)).exp(), rows)
    torch.testing.assert_close(probabilities, expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("metrics", [False, True])
def test_merge_matches_objective(kernels, options, metrics):
    """Three shards. The last has no rows, and the second is this rank's."""
    softcap = options.get("softcap")
    objective = Objective(37, options.get("z_loss", 0.0), options.get("label_smoothing", 0.0), softcap, metrics)
    generator = torch.Generator().manual_seed(0)
    stacked = torch.randn(3, len(objective.statistics), 11, generator=generator, dtype=torch.float64).to(DEVICE)
    stacked[:, 1] = stacked[:, 1].abs() + 0.1
    stacked[2] = 0
    stacked[2, 0] = torch.finfo(torch.float32).min
    target, g = torch.randn(2, 11, generator=generator, dtype=torch.float64).to(DEVICE)
    rows = problem(37)[2]
    merged, made = kernels.merge(objective, stacked, stacked[1, 0], target, rows, g)
    expected = objective.merge(stacked)
    assert merged.keys() == set(objective.results)
    for name in merged:
        torch.testing.assert_close(merged[name], expected[name], **near(torch.float64))
    if not objective.needs_lse_first:  # else the factors are not used
        factors = objective.factors(stacked[1, 0], target, rows, expected["lse"], g)
        torch.testing.assert_close(made.scale_m, factors.scale_m, **near(torch.float64))
        torch.testing.assert_close(made.target_m, factors.target_m, **near(torch.float64))


def test_exact_target_logit_enters_the_statistics(kernels):
    hidden, weight, rows = problem(37)
    target = torch.where(rows >= 0, 100.0, 0.0).double()
    factors = kernels.empty_factors(hidden, len(hidden), 37)
    statistics = statistics_of(kernels, hidden, weight, rows, target, Objective(37, metrics=True), factors)
    assert (statistics["shift"] == 100).equal(rows >= 0)
    assert torch.equal(statistics["best"].long()[rows >= 0], rows[rows >= 0])


def test_ties_go_to_the_lowest_row(kernels):
    hidden, _, rows = problem(37)
    weight = torch.zeros(37, WIDTH, dtype=torch.float64, device=DEVICE)
    target = torch.zeros_like(hidden[:, 0])
    factors = kernels.empty_factors(hidden, len(hidden), 37)
    statistics = statistics_of(kernels, hidden, weight, rows, target, Objective(37, metrics=True), factors, False)
    assert (statistics["best"] == 0).all()


def test_shard_without_rows_has_a_finite_floor(kernels):
    hidden, weight, rows = problem(0)
    target = kernels.target_logits(hidden, weight, rows)
    assert (target == 0).all()
    factors = kernels.empty_factors(hidden, len(hidden), 0)
    for metrics in (False, True):
        objective = Objective(37, smoothing=0.1, softcap=2.0, metrics=metrics)
        statistics = statistics_of(kernels, hidden, weight, rows, target, objective, factors)
        shift = statistics.pop("shift")
        assert (shift < -1e38).all() and shift.isfinite().all()
        assert all((values == 0).all() for name, values in statistics.items() if name != "best")
    assert (kernels.times_weight(factors, weight) == 0).all()


@pytest.mark.parametrize("softcap", [None, 2.5])
def test_dlogits_match_definition(kernels, softcap):
    hidden, weight, rows = problem(37)
    z, slope = logits_of(hidden, weight, softcap)
    lse = z.logsumexp(1)
    factors = kernels.empty_factors(hidden, len(hidden), 37)
    objective = Objective(37, z_loss=0.1, smoothing=0.37, softcap=softcap)
    kernels.dlogits(hidden, weight, rows, objective, factors, lse)
    expected = ((1 + 0.2 * lse).unsqueeze(1) * z.softmax(1) - 0.01) * slope
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
    product = factors.T @ scaled
    product.index_add_(0, rows[mine], target[mine].unsqueeze(1) * hidden[mine])
    gradient = torch.full_like(weight, torch.nan)
    for times, new in ((1, True), (2, False)):
        kernels.add_weight_gradient(gradient, factors, scaled, target, hidden, rows, new=new)
        torch.testing.assert_close(gradient, times * product, **near(torch.float64))


def test_rows_of_many_tokens_get_the_whole_sum(kernels):
    """Runs of 1, 7, 8, 9, 16 and 17 equal targets, between targets of other shards."""
    counts = {3: 1, 4: 7, 9: 8, 10: 9, 30: 16, 36: 17}
    rows = torch.tensor([row for row, count in counts.items() for _ in range(count)] + [-1] * 5)
    generator = torch.Generator().manual_seed(0)
    rows = rows[torch.randperm(len(rows), generator=generator)]
    hidden = torch.randn(len(rows), WIDTH, generator=generator, dtype=torch.float64)
    target = torch.rand(len(rows), generator=generator, dtype=torch.float64)
    factors = torch.zeros(len(rows), 37, dtype=torch.float64)
    gradient = torch.ones(37, WIDTH, dtype=torch.float64, device=DEVICE)
    given = (tensor.to(DEVICE) for tensor in (factors, hidden, target, hidden, rows))
    kernels.add_weight_gradient(gradient, *given, new=False)
    expected = torch.ones(37, WIDTH, dtype=torch.float64)
    mine = rows >= 0
    expected.index_add_(0, rows[mine], target[mine].unsqueeze(1) * hidden[mine])
    torch.testing.assert_close(gradient.cpu(), expected, **near(torch.float64))


def gradients(name: str, dtype: torch.dtype, **options):
    """Returns loss, dX and dW of the whole loss on these kernels."""
    hidden, weight, targets = problem(37, dtype)
    targets = targets.where(targets >= 0, -100)
    hidden.requires_grad_()
    main_grad = torch.full_like(weight, torch.nan, dtype=accurate_dtype(dtype))
    out = vocab_parallel_linear_cross_entropy(
        hidden,
        weight,
        targets,
        shard=VocabShard.of(0, 1, 37, 1),
        chunk_tokens=4,
        main_grad_vD=main_grad,
        main_grad_is_new=True,
        kernels=build(name),
        **options,
    )
    out.loss.backward()
    return out.loss.detach(), out.lse, out.entropy, out.correct, hidden.grad, main_grad


@NEEDS_TRITON
@pytest.mark.parametrize("metrics", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_triton_loss_matches_torch(smoothing, softcap, metrics):
    options = {"label_smoothing": smoothing, "softcap": softcap, "z_loss": 0.1, "metrics": metrics}
    both = (gradients(name, torch.float64, **options) for name in ("torch", "triton"))
    for one, other in zip(*both, strict=True):
        torch.testing.assert_close(one, other, **near(torch.float64))


@pytest.fixture
def wide_matmuls(monkeypatch):
    """A CPU's matmuls cannot return fp32 for Triton's kernels: these compute in fp32."""
    if DEVICE == "cpu" and importlib.util.find_spec("triton") is not None:
        from pretrain.vocab.kernels import triton

        monkeypatch.setattr(triton, "_multiply", lambda a, b, out: torch.mm(a.to(out.dtype), b.to(out.dtype), out=out))
        monkeypatch.setattr(triton, "_multiply_add", lambda out, a, b: out.addmm_(a.to(out.dtype), b.to(out.dtype)))


@NEEDS_TRITON
@pytest.mark.usefixtures("wide_matmuls")
def test_both_losses_in_bf16_are_near_float64():
    """Triton keeps the logits in fp32, torch rounds them: both are near the truth in float64."""
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
