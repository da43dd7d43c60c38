"""The kernels and the lookup on the device: near float64 with every option, and the same bits each time."""

from functools import partial
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.mesh import ranks
from pretrain.vocab import VocabShard, vocab_parallel_linear_cross_entropy
from pretrain.vocab.lookup import plan_lookup, vocab_parallel_lookup
from tests.benchmarks.head import DEVICE
from tests.benchmarks.rivals import Problem, ours
from tests.gpu_phases.running import Figures, Part
from tests.pretrain.vocab.oracle import OPTIONS, dense
from tests.pretrain.vocab.test_kernels import large

ROOT = Path(__file__).resolve().parents[2]
Sizes = list[tuple[int, int, int]]  # tokens, rows, width
ODD: Sizes = [(1000, 50_257, 256), (777, 50_257, 250), (1, 129, 64), (2050, 13, 8)]
LIMITS = {"bfloat16": 5e-3 if DEVICE == "cuda" else 2e-2, "float32": 1e-4}  # torch's kernels round bf16 logits
LAYOUTS = ("main_grad", "own gradient", "replicated", "without metrics")
TOKENS = (1024, 1025, 1536, 2048, 2500, 3072, 3073, 4096)  # around the bounds of torch's own kernels


def parts(small: bool, out: Path) -> dict[str, Part]:
    return {
        "the kernels' tests": partial(tests_of_kernels, "dlogits" if small else ""),
        "options against float64": partial(options_against_float64, [(40, 129, 16)] if small else ODD),
        "the same bits": partial(same_bits, (64, 32, 384) if small else (4096, 2048, 128_256), 2 if small else 5),
        "the lookup's gradient": partial(lookup_gradient, TOKENS[:2] if small else TOKENS, 2 if small else 1000),
    }


class Tally:
    """Counts the tests of a pytest run by outcome."""

    def __init__(self) -> None:
        self.counts = {"passed": 0, "failed": 0, "skipped": 0}

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1


def tests_of_kernels(which: str) -> Figures:
    """Runs tests/pretrain/vocab/test_kernels.py here, or those of its tests that `which` chooses."""
    import pytest

    tally = Tally()
    arguments = ["-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *(["-k", which] if which else [])]
    code = pytest.main([*arguments, str(ROOT / "tests/pretrain/vocab/test_kernels.py")], plugins=[tally])
    assert code == 0 and tally.counts["passed"], f"pytest ended with {code}: {tally.counts}"
    return tally.counts


def options_against_float64(sizes: Sizes) -> Figures:
    """The largest relative errors by dtype and quantity, over sizes, options and layouts; odd sizes included."""
    worst: dict[str, dict[str, float]] = {dtype: {} for dtype in LIMITS}
    cases, wrong = 0, []
    with ranks() as device:
        for (tokens, rows, width), options, layout in product(sizes, OPTIONS, LAYOUTS):
            hidden_ND, weight_VD, targets_N = large(rows, tokens, width)
            ones_N = torch.ones(tokens, device=device, dtype=torch.float64)
            truth = dense(hidden_ND.double(), weight_VD.double(), targets_N, ones_N, OPTIONS[options])
            for name, limit in LIMITS.items():
                dtype, cases = getattr(torch, name), cases + 1
                made = errors(hidden_ND.to(dtype), weight_VD.to(dtype), targets_N, layout, OPTIONS[options], truth)
                for key, error in made.items():
                    worst[name][key] = max(worst[name].get(key, 0.0), error)
                    if not error <= limit:
                        wrong.append(f"{key} {error:.1e}: {tokens}x{rows}x{width}, {name}, {options}, {layout}")
    assert not wrong, f"{len(wrong)} of {cases} cases are not near float64: {'; '.join(wrong[:5])}"
    return {"cases": cases, "worst": worst, "limits": LIMITS}


def errors(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, layout: str, options: dict, truth: dict[str, Tensor]
) -> dict[str, float]:
    """Relative errors of loss, statistics and gradients of one call."""
    x_ND, w_VD = hidden_ND.clone().requires_grad_(), weight_VD.clone().requires_grad_()
    main_grad_VD = None if layout == "own gradient" else torch.zeros_like(weight_VD, dtype=torch.float32)
    out = vocab_parallel_linear_cross_entropy(
        x_ND,
        w_VD,
        targets_N,
        shard=VocabShard.of(0, 1, len(weight_VD), 1),
        group=dist.group.WORLD,
        tokens="replicated" if layout == "replicated" else "distinct",
        metrics=layout != "without metrics",
        main_grad_vD=main_grad_VD,
        **options,
    )
    out.loss.backward()
    assert x_ND.grad is not None
    dweight_VD = w_VD.grad if main_grad_VD is None else main_grad_VD
    assert dweight_VD is not None
    pairs = {"loss": (out.loss, truth["losses"].sum()), "lse": (out.lse, truth["lse"])}
    pairs |= {"dX": (x_ND.grad, truth["dhidden"]), "dW": (dweight_VD, truth["dweight"])}
    if layout != "without metrics":
        pairs["entropy"] = out.entropy, truth["entropy"]
    tiny = 1e-12  # a gradient may be zero: one token that is ignored
    return {
        key: float((made.detach().double() - expected).norm() / expected.norm().clamp(min=tiny))
        for key, (made, expected) in pairs.items()
    }


def same_bits(size: tuple[int, int, int], repeats: int) -> Figures:
    """Computes dX and dW several times at a size of use. Returns their errors against float64, too."""
    problem = Problem.draw(*size, DEVICE)
    step = ours(problem)
    first = [gradient.clone() for gradient in step()]
    for turn in range(1, repeats):
        for name, once, again in zip(("dX", "dW"), first, step(), strict=True):
            assert torch.equal(once, again), f"{name} has other bits in turn {turn}"
    figures = {"turns": repeats, "tokens, width, rows": size}
    for name, made, truth in zip(("dX", "dW"), first, problem.truth(), strict=True):
        figures[f"error of {name}"] = float((made.double() - truth).norm() / truth.norm())
    return figures


def lookup_gradient(numbers: list[int], tries: int, width: int = 1024) -> Figures:
    """Sums the gradient of the rows again and again, for numbers of tokens that torch treats differently."""
    errors: dict[str, float] = {}
    generator = torch.Generator().manual_seed(0)
    for tokens in numbers:
        rows = tokens // 3
        ids_N = torch.randint(rows, (tokens,), generator=generator)
        upstream_ND = torch.randn(tokens, width, generator=generator).to(DEVICE)
        shard = VocabShard.of(0, 1, rows, 1)
        plan, ids_N = plan_lookup([ids_N], shard, torch.float32).to(DEVICE), ids_N.to(DEVICE)
        weight_VD = torch.zeros(rows, width, device=DEVICE, requires_grad=True)
        first_VD = None
        for turn in range(tries):
            hidden_ND = vocab_parallel_lookup(ids_N, weight_VD, shard=shard, plan=plan)
            (gradient_VD,) = torch.autograd.grad(hidden_ND, weight_VD, upstream_ND)
            first_VD = gradient_VD if first_VD is None else first_VD
            assert torch.equal(first_VD, gradient_VD), f"{tokens} tokens have other bits in turn {turn}"
        truth_VD = torch.zeros(rows, width, device=DEVICE, dtype=torch.float64)
        truth_VD.index_add_(0, ids_N, upstream_ND.double())
        errors[str(tokens)] = float((first_VD.double() - truth_VD).norm() / truth_VD.norm())
        assert errors[str(tokens)] < 1e-6, f"{tokens} tokens: an error of {errors[str(tokens)]:.1e}"
    return {"tries": tries, "errors by tokens": errors}
