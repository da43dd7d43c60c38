"""Measures the time and memory that a save costs a training: asynchronous, synchronous, and with torch's own writer.

    python tests/benchmarks/save.py [--vocab 50304] [--width 768] [--layers 4] [--folder .]

Prints Markdown. Each turn trains the same number of steps without a save and after each kind of save, and waits until
everything is written; figures are medians over the turns. "training held" is the time during which the training waited:
at the end of the step, and before the next update for data that was not copied yet. "whole cost" is the extra time of
the turn, "CPU" the extra processor time of the rank. On a CPU the training uses all cores, so its steps pay for the
writer; with one rank on two cores the writer has its own core, as beside a GPU. `--folder` chooses the disk to measure.
Run it on a quiet machine.
"""

import argparse
import ctypes
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from data_prep.durable import sha256_of
from launch.rehearsal import trainer_of
from pretrain.build import build_model
from pretrain.checkpoint.manager import CheckpointManager
from pretrain.checkpoint.state import ModelState, TrainState
from pretrain.data.loader import Batch, MicroBatch
from pretrain.hooks.base import Hook, TrainerView
from pretrain.mesh import Mesh
from pretrain.vocab.lookup import plan_lookup
from tests.benchmarks.measure import MIB, finish, markdown, progress, status_mib
from tests.benchmarks.step_rivals import device_of_ranks, ids_as_in_text
from tests.pretrain.tiny import tiny_config
from tests.ranks import run_ranks

KINDS = ("asynchronous", "synchronous", "torch's writer, then hashed")
Save = Callable[[int], Path]


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=50_304)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=2, help="per rank and step")
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--steps", type=int, default=12, help="after each save")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path())
    return parser.parse_args(arguments)


def main() -> None:
    options = options_of()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        progress("time")
        per_rank = run_ranks(options.ranks, times_on_rank, Path(folder), options, timeout=3600)
        memory = {}
        for kind in KINDS:
            progress(f"memory of {kind}")
            memory[kind] = max(run_ranks(options.ranks, memory_on_rank, Path(folder), options, kind, timeout=900))
    state, seconds_a_step, held, cost, work, written = per_rank[0]
    rows = []
    for kind in KINDS:
        shares = [f"{100 * figure[kind] / figure['synchronous']:.0f}%" for figure in (held, cost)]
        row = [kind, f"{held[kind]:.3f}", shares[0], f"{cost[kind]:.3f}", shares[1], f"{work[kind]:.3f}"]
        rows.append([*row, f"{written[kind]:.2f}", f"{memory[kind]:,.0f}"])
    print(
        f"\n{options.ranks} ranks, {os.cpu_count()} CPU cores, load {os.getloadavg()[0]:.1f}; {state / MIB:,.0f} MiB of"
        f" state per rank, {seconds_a_step:.2f} s per step, {options.repeats} turns of {options.steps} steps\n"
    )
    header = [
        "save",
        "training held, s",
        "of synchronous",
        "whole cost, s",
        "of synchronous",
    ]
    print(markdown([*header, "CPU, s", "on disk after, s", "extra peak MiB per rank"], rows))


class Run(Hook):
    """One rank of a training, with three ways to save."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        torch.set_num_threads(1)
        sizes = {"model__width": options.width, "model__heads": options.width // 64, "model__layers": options.layers}
        sizes |= {"model__context": options.length, "train__global_batch": 12, "vocab__multiple": 128}
        config = tiny_config(folder, folder, **sizes, train__precision="auto")
        self.mesh = Mesh.of(dist.get_world_size(), device_of_ranks())
        engine, model, vocab_optimizer = build_model(config, self.mesh, options.vocab)
        self.state = ModelState(engine, model.vocab, vocab_optimizer, self.mesh)
        self.trainer = trainer_of(model, engine, vocab_optimizer, self.mesh, config.train, config.optim, [self])
        self.held = 0.0  # seconds during which the training waited
        ids = ids_as_in_text(options.vocab, options.sequences, options.length, self.mesh.world)
        plan = plan_lookup([part[:, :-1].flatten() for part in ids], model.vocab.shard, model.vocab.compute_dtype)
        mine = ids[self.mesh.rank].to(self.mesh.device)
        plan = plan.to(self.mesh.device)
        micro = MicroBatch(mine[:, :-1].contiguous(), mine[:, 1:].contiguous(), plan=plan)
        self.batch = Batch([micro], options.sequences * options.length)
        self.folder = folder
        self.managers = {}
        for kind in KINDS[:2]:
            rules = tiny_config(folder, folder, checkpoint__asynchronous=kind == "asynchronous").checkpoint
            self.managers[kind] = CheckpointManager(folder / kind, self.state, self.mesh, rules, seed=0, about={})

    def before_update(self, trainer: TrainerView) -> None:
        start = time.perf_counter()
        for manager in self.managers.values():
            manager.wait_for_copy()
        self.held += time.perf_counter() - start

    def save(self, kind: str, step: int) -> None:
        start = time.perf_counter()
        self._save(kind, step)
        self.held += time.perf_counter() - start

    def _save(self, kind: str, step: int) -> None:
        if kind in self.managers:
            self.managers[kind].save(TrainState(step))
            return
        folder = self.folder / "torch"
        dcp.save(self.state.tensors(), storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
        for path in folder.glob(f"shard-{self.mesh.rank + 1:05d}-*"):
            sha256_of(path)
        dist.barrier()

    def wait(self) -> None:
        for manager in self.managers.values():
            manager.wait()
        finish()

    def tidy(self) -> None:
        """Removes what was written, and waits until nothing is in flight to the disk."""
        dist.barrier()
        if self.mesh.rank == 0:
            for kind in (*KINDS[:2], "torch"):
                shutil.rmtree(self.folder / kind, ignore_errors=True)
            os.sync()
        dist.barrier()


def times_on_rank(rank: int, world: int, folder: Path, options: argparse.Namespace) -> tuple:
    """Bytes of state per rank and seconds per step; by kind: seconds held, whole cost, processor, until on the disk."""
    run = Run(folder, options)
    state = sum(tensor.to_local().nbytes for tensor in run.state.tensors().values())
    plain: list[float] = []
    held: dict[str, list[float]] = {kind: [] for kind in KINDS}
    cost: dict[str, list[float]] = {kind: [] for kind in KINDS}
    work: dict[str, list[float]] = {kind: [] for kind in KINDS}
    written: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for turn in range(options.repeats + 1):
        totals, processor = {}, {}
        for kind in ("", *KINDS):
            run.tidy()
            run.held = 0.0
            start, begun = time.perf_counter(), time.process_time()
            if kind:
                run.save(kind, turn)
            for _ in range(options.steps):
                run.trainer.train_step(run.batch, run.trainer.agree(run.batch.n_targets))
            run.wait()
            totals[kind], processor[kind] = time.perf_counter() - start, time.process_time() - begun
            if turn and kind:
                held[kind].append(run.held)
                cost[kind].append(totals[kind] - totals[""])
                work[kind].append(processor[kind] - processor[""])
                longest = run.managers[kind].longest if kind in run.managers else run.held
                written[kind].append(longest)
                if kind in run.managers:
                    run.managers[kind].longest = 0.0
        if turn:
            plain.append(totals[""] / options.steps)
    run.tidy()
    middle = [
        {kind: statistics.median(values) for kind, values in kinds.items()} for kinds in (held, cost, work, written)
    ]
    return state, statistics.median(plain), *middle


def memory_on_rank(rank: int, world: int, folder: Path, options: argparse.Namespace, kind: str) -> float:
    """The peak memory of a rank's first save, in MiB above the training's memory."""
    run = Run(folder, options)
    run.trainer.train_step(run.batch, run.trainer.agree(run.batch.n_targets))
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark to the current memory
    before = status_mib("VmRSS")
    run.save(kind, 0)
    run.wait()
    peak = status_mib("VmHWM") - before
    run.tidy()
    return peak


if __name__ == "__main__":
    main()
