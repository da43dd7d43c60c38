#!/usr/bin/env python
"""What a training will need: `python launch/plan.py --help`. Nothing is started, and no GPU is asked."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":  # this code comes before other code with the same names
    sys.path[:] = [str(ROOT), *(entry for entry in sys.path if entry != str(ROOT / "launch"))]

from data_prep import terminal  # noqa: E402

if __name__ == "__main__":
    terminal.begin()  # before the imports that take seconds

import torch  # noqa: E402
from omegaconf import DictConfig, OmegaConf  # noqa: E402

from data_prep.columns import aligned  # noqa: E402
from data_prep.command import one_line, run_hydra  # noqa: E402
from launch import cluster as slurm  # noqa: E402
from launch.cluster import ClusterConfig  # noqa: E402
from launch.fit import larger, refusal  # noqa: E402
from launch.hardware import HARDWARE, Hardware  # noqa: E402
from launch.step import Item, StepCost, total  # noqa: E402
from pretrain.announce import counts, parameters  # noqa: E402
from pretrain.build import vocab_parallel, vocab_rows, vocab_workload  # noqa: E402
from pretrain.compose import build_config, register_groups  # noqa: E402
from pretrain.config.job import JobConfig  # noqa: E402
from pretrain.data import open_data  # noqa: E402
from pretrain.placement import UPDATE, Transfer, estimate  # noqa: E402
from pretrain.precision import compute_dtype  # noqa: E402
from pretrain.vocab.kernels import choose_kernels  # noqa: E402

MIB = 2**20
AXES = ("vocab", "dp", "world")
ROWS = (32_768, 65_536, 131_072, 262_144, 524_288)  # of the picture
MOST_RANKS = 1024
EXIT_TOO_LARGE = 1


@dataclass(frozen=True)
class Size:
    """One step with `ranks` to a copy of the matrix. near, far: bytes that a rank sends within a node and to others, on
    each axis. seconds: of the matrix and of the body.
    """

    ranks: int
    phases: dict[str, list[Item]]
    links: list[Transfer]
    near: dict[str, float]
    far: dict[str, float]
    seconds: tuple[float, float]

    @property
    def memory(self) -> list[Item]:
        """What is held when most is."""
        return max(self.phases.values(), key=total)


@dataclass(frozen=True)
class Plan:
    """A step on that hardware with each size of the vocab axis, and the one that the run will take."""

    hardware: Hardware
    sizes: list[Size]
    chosen: Size
    tokens: int  # of a rank and step

    @property
    def memory(self) -> list[Item]:
        return self.chosen.memory

    @property
    def peak_bytes(self) -> int:
        return total(self.memory)

    @property
    def links(self) -> list[Transfer]:
        return self.chosen.links

    @property
    def seconds(self) -> float:
        return sum(self.chosen.seconds)

    def table(self) -> str:
        return "\n\n".join([self._memory(), self._links(), self._sizes()])

    def _memory(self) -> str:
        phases = self.chosen.phases
        header = ["a rank holds, MiB", *phases, ""]
        rows = [
            [items[0].name, *(f"{item.bytes / MIB:,.0f}" for item in items), f"  {items[0].formula}"]
            for items in zip(*phases.values(), strict=True)
        ]
        of = f"  of {self.hardware.memory / MIB:,.0f}, {self.hardware.reserved / MIB:,.0f} of them for driver and NCCL"
        rows.append(["all", *(f"{total(items) / MIB:,.0f}" for items in phases.values()), of])
        return "\n".join(aligned([header, *rows], left=(0, -1)))

    def _links(self) -> str:
        rows = [["a rank sends, MiB a step", "axis", "calls", "", "", ""]]
        for one in self.links:
            sent = f"{one.sent / MIB:,.1f}"
            rows.append(
                [one.purpose, f"{one.axis} ({one.ranks})", f"{one.calls:,}", sent, f"  {one.kind}", one.formula]
            )
        return "\n".join(aligned(rows, left=(0, 4, 5)))

    def _sizes(self) -> str:
        header = ["ranks to a copy"]
        for axis in AXES:
            header += [f"{axis}: in node", "between"]
        rows = [[*header, "ms a step", "tokens/s a rank", "peak MiB", ""]]
        for size in self.sizes:
            row = [f"{size.ranks:,}"]
            for axis in AXES:
                row += [f"{size.near[axis] / MIB:,.0f}", f"{size.far[axis] / MIB:,.0f}"]
            seconds = sum(size.seconds)
            row += [f"{seconds * 1e3:,.0f}", f"{self.tokens / seconds:,.0f}", f"{total(size.memory) / MIB:,.0f}"]
            rows.append([*row, " <" * (size is self.chosen)])
        return "\n".join(aligned(rows, left=(0, -1)))


def plan(config: JobConfig, rows: int, world: int, node: int, hardware: Hardware) -> Plan:
    """For a vocabulary of `rows` on `world` ranks, `node` of them on each node. ValueError where the settings clash."""
    config.train.check_world(world)
    device, bf16 = hardware.device, hardware.bf16
    chosen = vocab_parallel(config, rows, world, node, device, bf16).ranks
    dtype, kernels = compute_dtype(config.train, device, bf16), choose_kernels(torch.device(device))
    work = vocab_workload(config, rows, world, dtype.itemsize)
    sizes = {
        p: _size(StepCost(config, work, p, world, dtype, kernels), node, hardware)
        for p in range(1, world + 1)
        if world % p == 0
    }
    return Plan(hardware, list(sizes.values()), sizes[chosen], work.tokens * work.micro_batches)


def _size(step: StepCost, node: int, hardware: Hardware) -> Size:
    links = [*step.of_matrix(), *step.of_body()]
    near, far = dict.fromkeys(AXES, 0.0), dict.fromkeys(AXES, 0.0)
    for one in links:
        outside = one.sent * _outside(one, step, node)
        near[one.axis] += one.sent - outside
        far[one.axis] += outside
    machine = hardware.machine(step.world, node, step.dtype.itemsize)
    matrix = estimate(step.p, step.work, machine).seconds
    body = step.of_body()
    outside = sum(one.sent * _outside(one, step, node) for one in body)
    moving = max((sum(one.sent for one in body) - outside) / machine.near, outside / machine.far)
    matmuls = step.flops / machine.flops
    update = UPDATE * step.body.stepped / machine.memory
    seconds = (max(matmuls, moving) if machine.overlaps else matmuls + moving) + update
    return Size(step.p, step.phases(), links, near, far, (matrix, seconds))


def _outside(one: Transfer, step: StepCost, node: int) -> float:
    """The part of a rank's traffic that leaves the node: a ring passes through all of its ranks of a node first."""
    if step.world <= node or (one.axis == "vocab" and step.p <= node and node % step.p == 0):
        return 0.0
    here = {"world": node, "vocab": node if step.p % node == 0 else 1, "dp": max(1, node // step.p)}[one.axis]
    return 1 - (here - 1) / (one.ranks - 1) if one.kind == "all-to-all" else 1 / here


def draw(config: JobConfig, world: int, node: int, hardware: Hardware, path: Path) -> None:
    """Peak memory and time of a step over the rows, for worlds of one node and more, each rank's tokens the same."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(f"plot={path} needs matplotlib: pip install matplotlib") from None
    repeats = config.train.global_batch // world
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    memory, speed = figure.subplots(1, 2)
    worlds = [node * 4**k for k in range(6) if node * 4**k <= max(world, MOST_RANKS)]
    asked = config.vocab.parallel
    for ranks in (one for one in worlds if asked == "auto" or one % int(asked) == 0):
        wider = replace(config, train=replace(config.train, global_batch=repeats * ranks))
        plans = [plan(wider, rows, ranks, node, hardware) for rows in ROWS]
        label = f"{ranks:,} rank{'s' if ranks > 1 else ''}"
        memory.plot(ROWS, [one.peak_bytes / 2**30 for one in plans], marker="o", markersize=3, label=label)
        speed.plot(ROWS, [one.tokens / one.seconds / 1e3 for one in plans], marker="o", markersize=3, label=label)
    for axes, title in ((memory, "peak memory of a rank, GiB"), (speed, "thousand tokens a second and rank")):
        axes.set_xscale("log", base=2)
        axes.set_xticks(ROWS, [f"{rows // 1024}k" for rows in ROWS])
        axes.set(title=title, xlabel="rows of the vocabulary", ylim=(0, None))
        axes.grid(alpha=0.3)
    speed.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Prints the plan. Exits 1 if the GPU cannot hold it, 2 on a wrong setting."""
    register_groups()
    slurm.register()
    run_hydra(_composed, "plan")


def _composed(composed: DictConfig) -> None:
    with one_line():
        OmegaConf.set_struct(composed, False)
        slurm.need_cluster(composed)
        given, plot = composed.pop("cluster"), composed.pop("plot")
        cluster = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ClusterConfig), given))
        assert isinstance(cluster, ClusterConfig)
        config, rows = _training(composed)
        hardware = HARDWARE[cluster.gpu or "cpu"]
        node, world = cluster.ranks_of_a_node, cluster.ranks

        def planner(changed: JobConfig) -> Plan:
            return plan(changed, rows, world, node, hardware)

        planned = planner(config)
        refused = refusal(config, world, planner, cluster.gpu, hardware) if cluster.gpu else ""
        tokens, ranks = f"{planned.tokens:,} tokens a rank and step", planned.chosen.ranks
        if plot is None:
            terminal.product()
        print(f"{cluster.describe()}; {config.engine.title}; {rows:,} rows; {tokens}")
        print(f"model: {parameters(config, *counts(config, rows), rows)}")
        print(f"vocab.parallel={config.vocab.parallel}: {ranks} to a copy of the matrix\n")
        print(planned.table())
        if plot is not None:
            draw(config, world, node, hardware, Path(plot))
            print(f"\npicture: {plot}")
        if refused:
            print(f"\ndoes not fit: {refused}")
            sys.exit(EXIT_TOO_LARGE)
        if cluster.gpu and (room := larger(config, world, planner, hardware.memory - hardware.reserved)):
            print(f"\nfits: {room}")


def _training(composed: DictConfig) -> tuple[JobConfig, int]:
    """A plan needs no run, and no data where the rows are given."""
    composed.run.dir = composed.run.dir or "not a run"
    known = composed.data.path or composed.data.corpora
    if not known and composed.vocab.size is None:
        raise ValueError("vocab.size=null must be given, or data.path, whose tokenizer tells it")
    composed.data.path = composed.data.path if known else "no data"
    config = build_config(composed)
    config.optim.check_steps(config.train.steps)
    if known:
        return config, vocab_rows(config, open_data(config.data))
    assert config.vocab.size is not None
    return config, config.vocab.size


if __name__ == "__main__":
    main()
