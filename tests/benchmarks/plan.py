"""Compares the memory per rank that launch/plan.py predicts with the peak memory of real ranks on CPUs.

    python tests/benchmarks/plan.py [--only nano gpt2]

Prints Markdown. A rank's memory is the peak of its process during the second step, above its memory before it built the
model. malloc is set to return freed memory at once.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from launch.step import StepCost, total
from pretrain.build import vocab_workload
from pretrain.compose import build_config, register_groups
from pretrain.config.job import JobConfig
from pretrain.precision import compute_dtype
from pretrain.vocab.kernels import choose_kernels
from pretrain.vocab.kernels.base import Kernels
from tests.benchmarks.measure import MIB, markdown, progress
from tests.launch.ranks import held_by_rank
from tests.ranks import run_ranks

CONF = Path(__file__).resolve().parents[2] / "conf"
RANKS = 2


class Case(NamedTuple):
    """A case: rows of the vocabulary, ranks per copy of the matrix (`parallel`), settings of the training."""

    rows: int
    parallel: int
    settings: str


ZERO = (
    "model=nano model.layers=6 model.width=512 model.heads=8 engine=deepspeed train.micro_batch=4 train.global_batch=8"
)
CASES = {
    "nano": Case(131_072, 2, "model=nano train.micro_batch=4 train.seq_len=128 train.global_batch=8"),
    "gpt2": Case(50_257, 2, "model=gpt2 train.micro_batch=2 train.seq_len=128 train.global_batch=4"),
    "untied, 2 copies, 2 micro-batches, blocks computed again": Case(
        32_768,
        1,
        "model=nano model.width=512 model.heads=8 vocab.tie=untied train.micro_batch=2 train.global_batch=8"
        " engine.activation_checkpointing=block",
    ),
    "8 blocks of width 384, many tokens": Case(
        4_096,
        2,
        "model=nano model.layers=8 model.width=384 model.heads=6 train.micro_batch=16 train.global_batch=32",
    ),
    **{f"ZeRO-{stage}": Case(4_096, 2, f"{ZERO} engine=deepspeed engine.zero_stage={stage}") for stage in range(4)},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    rows = []
    for name in parser.parse_args().only:
        progress(name)
        planned, measured = planned_and_measured(CASES[name])
        most = max(measured)
        rows.append([name, f"{planned:,.0f}", f"{most:,.0f}", f"{planned / most:.2f}"])
    print(f"\n{RANKS} ranks on CPUs, bf16\n")
    print(markdown(["model", "planned MiB", "measured MiB", "planned / measured"], rows))


def planned_and_measured(case: Case) -> tuple[float, list[float]]:
    """The planned MiB, and the measured MiB of each rank."""
    config = configured(*case.settings.split())
    step = step_of(config, case.rows, case.parallel, RANKS, choose_kernels(torch.device("cpu")))
    held = run_ranks(RANKS, held_by_rank, config, case.rows, case.parallel, timeout=300)
    return max(map(total, step.phases().values())) / MIB, held


def configured(*overrides: str) -> JobConfig:
    """The settings of a training. Its data and run folder are not used."""
    register_groups()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return build_config(compose("train", ["run.dir=runs/a", "data.path=data/a", *overrides]))


def step_of(config: JobConfig, rows: int, parallel: int, world: int, kernels: Kernels) -> StepCost:
    dtype = compute_dtype(config.train, "cpu")
    work = vocab_workload(config, rows, world, dtype.itemsize)
    return StepCost(config, work, parallel, world, dtype, kernels)


if __name__ == "__main__":
    main()
