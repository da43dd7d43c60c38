"""Measures a whole training step on ranks against FSDP2 with the embedding inside: tokens/s and peak memory per rank.

    python tests/benchmarks/step.py [--vocab 131072 ...] [--width 512] [--layers 2] [--sequences 4] [--length 256]
    python tests/benchmarks/step.py --summary [--only NAME ...]       one table over all sizes
    python tests/benchmarks/step.py --memory --ranks 1 2 4 8          peak memory alone, over the ranks

Prints Markdown. All systems have the same body, tokens (drawn by Zipf's law, as in text), AdamW and clip, and
fp32 main weights. They differ in who holds the matrix and how the loss is computed. Times are medians of interleaved
steps. Memory is measured in separate processes; it is all that the training adds to a process: weights, moments,
gradients and the needs of a step. Run it on a quiet machine.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.distributed as dist

from launch.rehearsal import trainer_of
from pretrain.config.engine import FSDP2Config
from pretrain.config.training import TrainingConfig
from pretrain.data.loader import Batch, MicroBatch
from pretrain.engine.fsdp2 import FSDP2Engine
from pretrain.families.family import ModelConfig
from pretrain.families.gpt2 import GPT2Config
from pretrain.mesh import Mesh
from pretrain.models.language_model import LanguageModel
from pretrain.optim import VocabOptimizer
from pretrain.vocab import VocabConfig, VocabParallelEmbedding, VocabShard
from pretrain.vocab.lookup import plan_lookup
from tests.benchmarks.measure import holding_peak_mib, markdown, progress
from tests.benchmarks.rivals import lacks
from tests.benchmarks.step_rivals import (
    OPTIM,
    Build,
    Step,
    chunked_cross_entropy,
    cross_entropy,
    device_of_ranks,
    fsdp2,
    fused_cross_entropy,
    ids_as_in_text,
    megatron,
)
from tests.ranks import run_ranks

HEAD = 64  # width of an attention head
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # fp32 for CPUs whose bf16 matmuls are slow


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[131_072])
    parser.add_argument("--width", type=int, nargs="+", default=[512])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=4, help="per rank and step")
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence")
    parser.add_argument("--precision", choices=DTYPES, default="bf16")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"among {list(SYSTEMS)}; {RIVAL} is always measured")
    parser.add_argument("--summary", action="store_true", help="one table: a line per vocabulary, width and system")
    parser.add_argument("--memory", action="store_true", help="peak memory alone, for each of the --ranks")
    options = parser.parse_args()
    if unknown := set(options.only or []) - set(SYSTEMS):
        parser.error(f"--only {sorted(unknown)} must be among {list(SYSTEMS)}")
    names = [name for name in SYSTEMS if options.only is None or name in (*options.only, RIVAL)]
    names = [name for name in names if not (name == FUSED and lacks("cut-cross-entropy"))]
    if MEGATRON in names and any(width // HEAD % ranks for width in options.width for ranks in options.ranks):
        parser.error(f"--width of {MEGATRON} must be a multiple of {HEAD} × ranks; give others with --only")
    sizes = [(vocab, width) for width in options.width for vocab in options.vocab]
    if options.memory:
        for vocab, width in sizes:
            print(memory_table(options, vocab, width, names), flush=True)
        return
    if len(options.ranks) > 1:
        parser.error(f"--ranks {options.ranks} must be one number, but with --memory")
    if not options.summary:
        for vocab, width in sizes:
            print(table(options, vocab, width, names), flush=True)
        return
    rows = [
        [f"{vocab:,} × {width:,}", f"{share_of_matrix(options, vocab, width):.0%}", *line[:5]]
        for vocab, width in sizes
        for line in lines_of(options, vocab, width, names)
    ]
    header = ["rows × width", "matrix, of all parameters", "training step", *HEADER[1:5]]
    print(f"\n{setting_of(options)}\n\n{markdown(header, rows)}")


HEADER = ["training step", "tokens/s", "× FSDP2", "peak MiB per rank", "× FSDP2", "loss, last step"]


def table(options: argparse.Namespace, vocab: int, width: int, names: list[str]) -> str:
    """Returns the title and the table of one size."""
    title = f"\n{setting_of(options)} of width {width}, {vocab:,} rows, tied\n\n"
    return title + markdown(HEADER, lines_of(options, vocab, width, names))


def memory_table(options: argparse.Namespace, vocab: int, width: int, names: list[str]) -> str:
    """Measures the memory of all systems on each number of ranks. A rank always has the same tokens."""
    setting = model_of(options, width), vocab, options.sequences, DTYPES[options.precision]
    rows = []
    for ranks in options.ranks:
        row = [str(ranks)]
        for name in names:
            progress(f"{vocab:,} rows of width {width}, {ranks} ranks: memory of {name}")
            row.append(f"{max(run_ranks(ranks, memory_on_rank, *setting, name, timeout=900)):,.0f}")
        rows.append(row)
    tokens, body = f"{options.sequences * options.length:,} tokens", f"{options.layers} blocks of width {width}"
    title = (
        f"\nCPU, {options.precision}, {tokens} per rank and step, {body}, {vocab:,} rows, tied; peak MiB per rank\n\n"
    )
    return title + markdown(["ranks", *names], rows)


def setting_of(options: argparse.Namespace) -> str:
    (ranks,) = options.ranks
    tokens = ranks * options.sequences * options.length
    return (
        f"{ranks} ranks, CPU, 1 thread each, {options.precision}, {tokens:,} tokens per step, {options.layers} blocks"
    )


def model_of(options: argparse.Namespace, width: int) -> GPT2Config:
    return GPT2Config(layers=options.layers, width=width, heads=width // HEAD, context=options.length)


def share_of_matrix(options: argparse.Namespace, vocab: int, width: int) -> float:
    """Returns the matrix's part of all parameters."""
    with torch.device("meta"):
        body = sum(parameter.numel() for parameter in model_of(options, width).body().parameters())
    return vocab * width / (vocab * width + body)


def lines_of(options: argparse.Namespace, vocab: int, width: int, names: list[str]) -> list[list[str]]:
    """Measures all systems at one size. Returns a line per system, in the order of HEADER."""
    setting = model_of(options, width), vocab, options.sequences, DTYPES[options.precision]
    (ranks,) = options.ranks
    progress(f"{vocab:,} rows of width {width}: time")
    seconds, losses = run_ranks(ranks, times_on_rank, *setting, options.repeats, names, timeout=3600)[0]
    tokens = ranks * options.sequences * options.length
    mib = {}
    for name in names:
        progress(f"{vocab:,} rows of width {width}: memory of {name}")
        mib[name] = max(run_ranks(ranks, memory_on_rank, *setting, name, timeout=900))
    lines = []
    for name in names:
        faster, smaller = seconds[RIVAL] / seconds[name], mib[name] / mib[RIVAL]
        times = [f"{tokens / seconds[name]:,.0f}", f"{faster:.2f}"]
        lines.append([name, *times, f"{mib[name]:,.0f}", f"{smaller:.2f}", f"{losses[name]:.4f}"])
    return lines


# --- the systems ------------------------------------------------------------------------------------------------------


def rowshard(model: ModelConfig, vocab: int, sequences: int, dtype: torch.dtype, compiled: bool = False) -> Step:
    """The trainer's own step. On a CPU it includes the planning of the lookup, which the loader normally does ahead of
    time: there the loader would take this time from the step.
    """
    mesh = Mesh.of(dist.get_world_size(), device_of_ranks())
    shard = VocabShard.of(mesh.vocab_rank, mesh.vocab_size, vocab)
    matrix = VocabParallelEmbedding(
        VocabConfig(),
        shard,
        model.width,
        seed=0,
        group=mesh.vocab_group,
        compute_dtype=dtype,
        device=mesh.device,
    )
    with torch.device("meta"):
        body = model.body()
    engine = FSDP2Engine(FSDP2Config(compile=compiled), OPTIM, dtype, 0)
    loop = TrainingConfig(seq_len=model.context, global_batch=sequences * mesh.world, micro_batch=sequences)
    language = LanguageModel(matrix, engine.wrap(body, mesh))
    rows = VocabOptimizer(matrix.parameters(), OPTIM, mesh)
    trainer = trainer_of(language, engine, rows, mesh, loop, OPTIM)
    ids = ids_as_in_text(vocab, sequences, model.context, mesh.world)

    def planned() -> Batch:
        plan = plan_lookup([part[:, :-1].flatten() for part in ids], shard, dtype).to(mesh.device)
        mine = ids[mesh.rank].to(mesh.device)
        micro = MicroBatch(mine[:, :-1].contiguous(), mine[:, 1:].contiguous(), plan=plan)
        return Batch([micro], sequences * model.context)

    ready = planned() if mesh.device.type == "cuda" else None

    def step() -> float:
        batch = ready or planned()
        report = trainer.train_step(batch, trainer.agree(batch.n_targets))
        return report.loss

    return step


RIVAL, FUSED, MEGATRON = "FSDP2", "FSDP2, fused loss", "Megatron-Core, tensor parallel"
SYSTEMS: dict[str, Build] = {
    "Rowshard": rowshard,
    RIVAL: partial(fsdp2, loss=cross_entropy),
    "FSDP2, logits in fp32": partial(fsdp2, loss=partial(cross_entropy, cast=True)),
    "FSDP2, chunked loss": partial(fsdp2, loss=chunked_cross_entropy),
    FUSED: partial(fsdp2, loss=fused_cross_entropy),
    MEGATRON: megatron,
}


# --- on one rank ------------------------------------------------------------------------------------------------------


def times_on_rank(
    rank: int,
    world: int,
    model: ModelConfig,
    vocab: int,
    sequences: int,
    dtype: torch.dtype,
    repeats: int,
    names: list[str],
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds per step, and the loss of the last step, by name."""
    torch.set_num_threads(1)
    steps = {name: SYSTEMS[name](model, vocab, sequences, dtype) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    losses = {}
    for turn in range(repeats + 1):
        for name, step in steps.items():
            dist.barrier()
            start = time.perf_counter()
            losses[name] = step()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}, losses


def memory_on_rank(
    rank: int, world: int, model: ModelConfig, vocab: int, sequences: int, dtype: torch.dtype, name: str
) -> float:
    torch.set_num_threads(1)
    return holding_peak_mib(lambda: SYSTEMS[name](model, vocab, sequences, dtype))


if __name__ == "__main__":
    main()
