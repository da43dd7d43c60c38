"""Plans a training step for each size of the vocab axis on given hardware: memory, traffic and time.

Not part of plan.py, which is the command, because a Slurm submit and the search in fit.py plan as well.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from data_prep.columns import aligned
from launch.hardware import Hardware
from launch.step import Item, StepCost, total
from pretrain.build import vocab_workload
from pretrain.config.job import JobConfig
from pretrain.placement import Machine, Transfer, choose_parallel, estimate, update_bytes
from pretrain.precision import compute_dtype
from pretrain.vocab.kernels import choose_kernels

MIB = 2**20
AXES = ("vocab", "dp", "world")


class Update(NamedTuple):
    """Seconds of the step of the body's optimizer."""

    numbers: float  # reading and writing weights, states and gradients
    whole: float  # Newton-Schulz of the matrices that the busiest rank owns
    moving: float  # matrices to their owners and back


@dataclass(frozen=True)
class Size:
    """One step with one size of the vocab axis."""

    ranks: int  # per copy of the matrix
    phases: dict[str, list[Item]]  # memory of a rank by phase
    links: list[Transfer]  # all transfers of a rank
    near: dict[str, float]  # bytes that a rank sends within its node, by axis
    far: dict[str, float]  # bytes that a rank sends to other nodes, by axis
    seconds: tuple[float, float, float]  # for the matrix, for the body, and for the body's optimizer
    update: Update  # parts of the last

    @property
    def memory(self) -> list[Item]:
        """Items of the phase with the highest total."""
        return max(self.phases.values(), key=total)


@dataclass(frozen=True)
class Plan:
    """A step on the hardware for each size of the vocab axis, and the size that the run will use."""

    hardware: Hardware
    sizes: list[Size]
    chosen: Size
    tokens: int  # per rank and step

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
        return "\n\n".join([self._memory(), self._links(), self._sizes(), *self._update()])

    def _memory(self) -> str:
        phases = self.chosen.phases
        header = ["a rank holds, MiB", *phases, ""]
        rows = [
            [items[0].name, *(f"{item.bytes / MIB:,.0f}" for item in items), f"  {items[0].formula}"]
            for items in zip(*phases.values(), strict=True)
        ]
        card = self.hardware
        capacity = f"  of {card.memory / MIB:,.0f}, {card.reserved / MIB:,.0f} of them for driver and NCCL"
        rows.append(["all", *(f"{total(items) / MIB:,.0f}" for items in phases.values()), capacity])
        return "\n".join(aligned([header, *rows], left=(0, -1)))

    def _links(self) -> str:
        rows = [["a rank sends, MiB per step", "axis", "calls", "", "", ""]]
        for link in self.links:
            sent = f"{link.sent / MIB:,.1f}"
            rows.append(
                [link.purpose, f"{link.axis} ({link.ranks})", f"{link.calls:,}", sent, f"  {link.kind}", link.formula]
            )
        return "\n".join(aligned(rows, left=(0, 4, 5)))

    def _update(self) -> list[str]:
        update = self.chosen.update
        if not update.whole:
            return []
        share, (numbers, whole, moving) = sum(update) / self.seconds, (f"{part * 1e3:,.1f}" for part in update)
        return [
            f"step of the body's optimizer: {sum(update) * 1e3:,.1f} ms, {share:.1%} of the step"
            f" (Newton-Schulz {whole}, its traffic {moving}, weights and states {numbers})"
        ]

    def _sizes(self) -> str:
        header = ["ranks per copy"]
        for axis in AXES:
            header += [f"{axis}: in node", "between"]
        rows = [[*header, "ms per step", "tokens/s per rank", "peak MiB", ""]]
        for size in self.sizes:
            row = [f"{size.ranks:,}"]
            for axis in AXES:
                row += [f"{size.near[axis] / MIB:,.0f}", f"{size.far[axis] / MIB:,.0f}"]
            seconds = sum(size.seconds)
            row += [f"{seconds * 1e3:,.0f}", f"{self.tokens / seconds:,.0f}", f"{total(size.memory) / MIB:,.0f}"]
            rows.append([*row, " <" * (size is self.chosen)])
        return "\n".join(aligned(rows, left=(0, -1)))


def plan(config: JobConfig, rows: int, world: int, node: int, hardware: Hardware) -> Plan:
    """Plans for a vocabulary of `rows` on `world` ranks, `node` of them per node.

    Raises ValueError if the settings conflict.
    """
    config.train.check_world(world)
    dtype = compute_dtype(config.train, hardware.device, hardware.bf16)
    kernels = choose_kernels(torch.device(hardware.device))
    work = vocab_workload(config, rows, world, dtype.itemsize)
    chosen = choose_parallel(config.vocab.parallel, work, Machine.of(hardware.device, world, node)).ranks
    sizes = {
        p: _size(StepCost(config, work, p, world, dtype, kernels), node, hardware)
        for p in range(1, world + 1)
        if world % p == 0
    }
    return Plan(hardware, list(sizes.values()), sizes[chosen], work.tokens * work.micro_batches)


def _size(step: StepCost, node: int, hardware: Hardware) -> Size:
    body, exchanged = step.of_body(), step.of_optimizer()
    links = [*step.of_matrix(), *body, *exchanged]
    near, far = dict.fromkeys(AXES, 0.0), dict.fromkeys(AXES, 0.0)
    for link in links:
        outside = link.sent * _outside(link, step, node)
        near[link.axis] += link.sent - outside
        far[link.axis] += outside
    machine = hardware.machine(step.world, node, step.dtype.itemsize)
    matrix = estimate(step.p, step.work, machine).seconds

    def moving(transfers: list[Transfer]) -> float:
        outside = sum(transfer.sent * _outside(transfer, step, node) for transfer in transfers)
        return max((sum(transfer.sent for transfer in transfers) - outside) / machine.near, outside / machine.far)

    matmuls = step.flops / machine.flops
    seconds = max(matmuls, moving(body)) if machine.overlaps else matmuls + moving(body)
    whole = step.body.schedule
    update = Update(
        update_bytes(step.shapes.state) * step.body.stepped / machine.memory,
        whole.flops / _rate(step, hardware, machine) if whole else 0.0,
        moving(exchanged),
    )
    return Size(step.p, step.phases(), links, near, far, (matrix, seconds, sum(update)), update)


def _rate(step: StepCost, hardware: Hardware, machine: Machine) -> float:
    """FLOP/s of Newton-Schulz, whose dtype can be another than that of the other matmuls."""
    itemsize = step.shapes.itemsize
    return hardware.machine(step.world, machine.node, itemsize).flops if itemsize else machine.flops


def _outside(link: Transfer, step: StepCost, node: int) -> float:
    """Returns the share of a rank's traffic that leaves the node: a ring visits all ranks of a node first."""
    if step.world <= node or (link.axis == "vocab" and step.p <= node and node % step.p == 0):
        return 0.0
    local_ranks = {"world": node, "vocab": node if step.p % node == 0 else 1, "dp": max(1, node // step.p)}[link.axis]
    return 1 - (local_ranks - 1) / (link.ranks - 1) if link.kind == "all-to-all" else 1 / local_ranks
