"""The head and its loss against its rivals, and the matmuls that limit it, at sizes of models."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tests.benchmarks.head import DEVICE, LIMIT
from tests.benchmarks.measure import MIB, extra_peak_mib, interleaved_times
from tests.benchmarks.rivals import RIVALS, Problem, lacks
from tests.gpu_phases.running import Figures, Part, say

OURS = "Rowshard"
FULL = [
    (4096, 4096, 128_256),
    (8192, 2048, 128_256),
    (8192, 4096, 131_072),
    (8192, 2048, 262_144),
    (8192, 2048, 524_288),
]  # tokens, width, rows
SMALL = [(64, 32, 384), (96, 48, 512)]
COMPILED = ("cut-cross-entropy", "F.cross_entropy, logits in fp32, compiled")  # on a CPU this takes a minute
BF16, FP32 = torch.bfloat16, torch.float32


def name_of(size: tuple[int, int, int]) -> str:
    return "M={} D={} V={}".format(*size)


def parts(small: bool, out: Path) -> dict[str, Part]:
    names = [name for name in RIVALS if not (small and name in COMPILED)]
    sizes, repeats = (SMALL, 1) if small else (FULL, 9)
    found: dict[str, Part] = {name_of(size): partial(rivals, size, names, repeats) for size in sizes}
    return found | {"the parts of the matmuls": partial(matmuls, *sizes[0], repeats)}


def rivals(size: tuple[int, int, int], names: list[str], repeats: int) -> Figures:
    """Seconds, rate and extra peak memory of each; of those that cannot run, the reason.

    Memory first: what is out of memory is not timed.
    """
    tokens, width, rows = size
    problem = Problem.draw(*size, DEVICE)
    reasons = {name: f"needs {missing}" for name in names if (missing := lacks(name))}
    steps, mib = {}, {}
    for name in names:
        if name in reasons:
            continue
        say(f"  {name}")
        try:
            step = RIVALS[name](problem)
            mib[name] = extra_peak_mib(step)
            steps[name] = step
        except torch.OutOfMemoryError:
            reasons[name] = "out of memory"
        except Exception as error:
            if name in (OURS, LIMIT):
                raise
            reasons[name] = f"{type(error).__name__}: {str(error).strip()[:200]}"
    assert OURS in steps and LIMIT in steps, reasons
    seconds = interleaved_times(steps, repeats)
    flops = 6 * tokens * width * rows
    figures: dict[str, Figures] = {name: {"reason": reason} for name, reason in reasons.items()}
    for name in steps:
        gradient = rows * width * (4 if name == OURS else 2) / MIB
        figures[name] = {
            "seconds": seconds[name],
            "tflops": flops / seconds[name] / 1e12,
            "of bare": seconds[LIMIT] / seconds[name],
            "extra MiB": mib[name],
            "beyond dW MiB": mib[name] - gradient,
        }
    return {"tokens": tokens, "width": width, "rows": rows, "rivals": {name: figures[name] for name in names}}


def matmuls(tokens: int, width: int, rows: int, repeats: int) -> Figures:
    """Milliseconds of each matmul of the head as the kernels call it, and of the passes over memory beside them.

    They show what cuBLAS hides of the writes to fp32, and which tokens per chunk pay.
    """
    hidden_MD = torch.randn(tokens, width, device=DEVICE).to(BF16)
    rows_VD = (torch.randn(rows, width, device=DEVICE) * 0.02).to(BF16)
    factors_MV = torch.empty(tokens, rows, device=DEVICE, dtype=BF16).normal_()
    dhidden_MD, drows_VD = torch.empty(tokens, width, device=DEVICE), torch.zeros(rows, width, device=DEVICE)
    runs: dict[str, Callable[[], object]] = {
        "X·Wᵀ in bf16": lambda: torch.mm(hidden_MD, rows_VD.T),
        "F·W in fp32": lambda: product_into(dhidden_MD, factors_MV, rows_VD, 0),
        "Fᵀ·X in bf16": lambda: torch.mm(factors_MV.T, hidden_MD),
        "zeros of dW": drows_VD.zero_,
        "rows from fp32 to bf16": lambda: drows_VD.to(BF16),
    }
    for part in sorted({tokens // 8, tokens // 4, tokens // 2, tokens}):
        out_mV = torch.empty(part, rows, device=DEVICE)
        some = slice(0, part)
        runs[f"X·Wᵀ in fp32, {part} tokens"] = partial(product_into, out_mV, hidden_MD[some], rows_VD.T, 0)
        for beta in (0, 1):
            text = f"dW {'+' * beta}= Fᵀ·X in fp32, {part} tokens"
            runs[text] = partial(product_into, drows_VD, factors_MV[some].T, hidden_MD[some], beta)
    seconds = interleaved_times(runs, repeats)
    if DEVICE == "cuda":
        seconds |= copies(repeats)
    return {"tokens": tokens, "width": width, "rows": rows, "ms": {name: 1e3 * s for name, s in seconds.items()}}


def product_into(out: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """out = a · b + beta · out, from bf16 to fp32, in one call where the device can."""
    if out.is_cuda and beta:
        torch.addmm(out, a, b, out_dtype=FP32, out=out)
    elif out.is_cuda:
        torch.mm(a, b, out_dtype=FP32, out=out)
    else:
        torch.addmm(out, a.to(FP32), b.to(FP32), beta=beta, out=out)


def copies(repeats: int) -> dict[str, float]:
    """Seconds of copies of 1 GiB: on the device, and to the host's memory."""
    source, target = torch.empty(2**28, device=DEVICE), torch.empty(2**28, device=DEVICE)
    pinned, pageable = torch.empty(2**28, pin_memory=True), torch.empty(2**28)
    runs = {"on the device": target, "to pinned memory": pinned, "to pageable memory": pageable}
    return interleaved_times({f"1 GiB {to}": partial(out.copy_, source) for to, out in runs.items()}, min(3, repeats))
