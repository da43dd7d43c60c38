"""Memory and traffic of DeepSpeed per step. Separate from deepspeed.py because plans use it without an engine."""

from itertools import accumulate

from ..config.engine import DeepSpeedConfig
from ..optim.owners import Cut
from ..placement import Transfer, Workload
from .footprint import FP32, Shapes, agreements, exchanges, numbers

# DeepSpeed's defaults, which do not depend on the model, in numbers:
LARGEST_BUCKET = 500_000_000  # largest bucket of the gradients' reduction
PERSISTENT = 100_000  # ZeRO-3 does not shard parameters up to this size
REUSED = 500_000_000  # ZeRO-3 keeps gathered weights from forward to backward if the body is at most this size


class DeepSpeedFootprint:
    """Bytes at each ZeRO stage. Gradients are reduced in buckets of the body's size, at most LARGEST_BUCKET."""

    def __init__(self, engine: DeepSpeedConfig, shapes: Shapes, work: Workload, p: int, world: int) -> None:
        self.engine, self.shapes, self.work, self.world = engine, shapes, work, world  # p does not matter
        self.all = numbers(shapes.all)
        self.parts = [-(-group // (2 * world)) * 2 for group in shapes.groups]
        self.cut = sum(-(-shape.numel() // world) for shape in shapes.all)  # at stage 3
        self.large = [shape for shape in shapes.all if shape.numel() > PERSISTENT]
        self.stepped = (self.all, sum(self.parts), sum(self.parts), self.cut)[engine.zero_stage]
        self.schedule = shapes.schedule(world, self._cuts())
        self.held = 0 if engine.offload == "cpu" else self.stepped
        self.low = work.itemsize < FP32
        self.bucket = min(self.all, LARGEST_BUCKET)
        stage, copies = engine.zero_stage, "body · i + body / ranks · 4"
        self.formulas = (
            ("body · 4", copies, copies, "body / ranks · (i + 4)")[stage],
            f"body{' / ranks' * (stage > 0)} · {shapes.state:g}",
            ("body · 4", "body · (i + 4)", "body / ranks · 4", "body / ranks · 4")[stage],
            ("bucket · 4, body · i", "bucket · 4", "bucket · (4 + 2 · i)", "bucket · (4 + 2 · i), body · i")[stage],
        )

    def _cuts(self) -> list[Cut]:
        """How the ranks hold each weight of the blocks; from stage 1 on in its own group, the first."""
        stage, sizes = self.engine.zero_stage, [shape.numel() for shape in self.shapes.hidden]
        if stage == 0:
            return [Cut(size, replicated=True) for size in sizes]
        if stage == 3:
            return [Cut(-(-size // self.world)) for size in sizes]
        return [Cut(self.parts[0], before) for before in accumulate(sizes[:-1], initial=0)]

    @property
    def weights(self) -> int:
        stage, item = self.engine.zero_stage, self.work.itemsize
        if stage == 0:
            return FP32 * self.all
        small = self.all - numbers(self.large)
        return FP32 * self.held + item * (self.all if stage < 3 else self.cut + small)

    @property
    def states(self) -> int:
        return round(self.shapes.state * self.held)

    def gradients(self, behind: int) -> int:
        part = 1.0 if self.work.micro_batches > 1 else behind / len(self.shapes.blocks)
        own = self.work.itemsize if self.engine.zero_stage == 1 else 0
        return round(part * ((FP32 + own) * self.all if self.engine.zero_stage < 2 else FP32 * self.held))

    def gathered(self, behind: int, in_block: bool) -> int:
        stage, item = self.engine.zero_stage, self.work.itemsize
        bucket = self.bucket * (FP32 if stage < 2 else FP32 + 2 * item) * (behind > 0)
        if stage == 0:
            computing = behind < len(self.shapes.blocks)
            return bucket + item * self.shapes.matmuls * (self.low and computing)  # autocast's copies
        if stage < 3:
            return bucket
        live = numbers(self.large) if self.all <= REUSED else 2 * numbers(self.shapes.blocks[0])
        return bucket + item * live

    def transfers(self) -> list[Transfer]:
        stage, repeats, item = self.engine.zero_stage, self.work.micro_batches, self.work.itemsize
        buckets = -(-self.all // LARGEST_BUCKET)

        def moved(purpose: str, kind: str, calls: int, given: int, formula: str) -> Transfer:
            return Transfer(purpose, kind, "world", self.world, calls, given, formula)

        if stage == 3:
            gathers = repeats * (1 if self.all <= REUSED else 2)
            small = [shape for shape in self.shapes.all if shape.numel() <= PERSISTENT]
            given = gathers * sum(-(-shape.numel() // self.world) for shape in self.large)
            given += sum(-(-shape.numel() // self.world) for shape in small)
            summed = repeats * self.world * self.cut * FP32
            return [
                moved("weights", "all-gather", gathers + len(small), given * item, "body / ranks · i"),
                moved("gradients", "reduce-scatter", repeats * buckets, summed, "body · 4"),
                agreements(self.world),
            ]
        reductions = repeats if stage == 2 else 1
        padded = self.world * sum(self.parts) if stage == 1 and self.low else self.all
        summed = reductions * padded * FP32
        gradients = moved("gradients", "all-reduce", reductions * buckets, summed, "body · 4")
        if stage == 0:
            return [gradients, agreements(self.world)]
        weights = moved("weights", "all-gather", len(self.parts), sum(self.parts) * item, "body / ranks · i")
        return [gradients, weights, agreements(self.world)]

    def exchanges(self) -> list[Transfer]:
        return exchanges(self.schedule, self.shapes.itemsize or self.work.itemsize, "world")
