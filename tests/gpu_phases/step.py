"""Whole training steps of models on one device: tokens/s, MFU and memory, against FSDP2, and against the plan."""

import statistics
import time
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from launch.hardware import HARDWARE
from launch.planner import plan
from pretrain.build import flops_per_token
from pretrain.config.job import JobConfig
from pretrain.mesh import ranks
from pretrain.peaks import peak_of
from pretrain.precision import compute_dtype
from tests.benchmarks import step as benchmark
from tests.benchmarks.measure import MIB, finish, holding_peak_mib
from tests.benchmarks.plan import configured
from tests.gpu_phases.running import Figures, Part, say


@torch.compile
def fp32_loss(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    return benchmark.cross_entropy(hidden_ND, weight_VD, targets_N, cast=True)


OURS, RIVAL, FUSED = "Rowshard, compiled", "FSDP2, compiled", "FSDP2, compiled, fused loss"
SYSTEMS: dict[str, benchmark.Build] = {
    OURS: partial(benchmark.rowshard, compiled=True),
    RIVAL: partial(benchmark.fsdp2, loss=fp32_loss, compiled=True),
    FUSED: partial(benchmark.fsdp2, loss=benchmark.fused_cross_entropy, compiled=True),
    "FSDP2, compiled, chunked loss": partial(benchmark.fsdp2, loss=benchmark.chunked_cross_entropy, compiled=True),
    "Rowshard": benchmark.rowshard,
}
FIRST = (OURS, RIVAL)
MODELS = {"llama_1b": (4, 2048), "gpt2_xl": (4, 1024)}  # sequences and their length; no activation checkpointing
VOCABULARIES = (262_144, 131_072)
TINY = "model.layers=2 model.width=64 model.heads=2"
SMALL = {"llama_1b": f"{TINY} model.kv_heads=1 model.inner=96", "gpt2_xl": TINY}


def parts(small: bool, out: Path) -> dict[str, Part]:
    """The systems of FIRST at every size come first, then the others."""
    rows = (512,) if small else VOCABULARIES
    sizes = [(model, vocab) for model in MODELS for vocab in rows]
    others = [name for name in SYSTEMS if name not in FIRST and not (small and name == FUSED)]
    found: dict[str, Part] = {}
    for group in (FIRST, others):
        for model, vocab in sizes[: None if group is FIRST or not small else 1]:
            for name in group:
                found[f"{model} V={vocab}, {name}"] = partial(one, model, vocab, name, small)
    return found


def one(model: str, vocab: int, name: str, small: bool) -> Figures:
    """Measures one system: the median step, its memory and the loss, beside the plan of the same training."""
    config = configuration(model, vocab, small)
    stance = "force_eager" if small else "default"  # a rehearsal has no time for a compiler
    with ranks() as device, torch.compiler.set_stance(stance):
        dtype = compute_dtype(config.train, device.type)
        build = partial(SYSTEMS[name], config.model, vocab, config.train.micro_batch, dtype)
        seconds, losses = [], []
        start = time.monotonic()

        def timed() -> benchmark.Step:
            step = build()
            say(f"  built after {time.monotonic() - start:.0f} s")
            for turn in range(2 if small else 13):
                begun = time.perf_counter()
                losses.append(step())
                finish()
                if turn > 2 or small:
                    seconds.append(time.perf_counter() - begun)
            say(f"  {len(seconds)} steps after {time.monotonic() - start:.0f} s")
            return step

        try:
            mib = holding_peak_mib(timed)
        except torch.OutOfMemoryError:
            if name in FIRST[:1]:
                raise
            return {"model": model, "rows": vocab, "system": name, "reason": "out of memory"}
        tokens = config.train.micro_batch * config.model.context
        rate = tokens / statistics.median(seconds)
        figures = {"model": model, "rows": vocab, "system": name, "tokens": tokens, "tokens/s": rate}
        figures |= {"losses": [losses[0], losses[-1]], "peak MiB": mib}
        return figures | utilisation(config, vocab, rate, device) | planned(config, vocab, device)


def configuration(model: str, vocab: int, small: bool) -> JobConfig:
    sequences, length = (2, 32) if small else MODELS[model]
    sizes = SMALL[model].split() if small else []
    given = [f"vocab.size={vocab}", f"train.micro_batch={sequences}", f"train.global_batch={sequences}"]
    return configured(f"model={model}", f"model.context={length}", *sizes, *given)


def utilisation(config: JobConfig, vocab: int, tokens_per_s: float, device: torch.device) -> Figures:
    """MFU by the project's own count; nothing if the peak of the device is not known."""
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    peak = peak_of(card, compute_dtype(config.train, device.type).itemsize)
    return {"MFU": tokens_per_s * flops_per_token(config, vocab) / peak} if peak else {}


def planned(config: JobConfig, vocab: int, device: torch.device) -> Figures:
    """Plans the same training as launch/plan.py does, for this card; for an unknown card, for an H100."""
    card = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    name = next((name for name in HARDWARE if name.partition("-")[0] in card.lower()), "h100")
    made = plan(config, vocab, 1, 1, HARDWARE[name])
    return {
        "plan's hardware": name,
        "planned MiB": made.peak_bytes / MIB,
        "planned tokens/s": made.tokens / made.seconds,
    }
