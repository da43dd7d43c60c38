"""Searches settings with which a training fits its GPUs, or uses them fully. planner.py plans one configuration.

The search is arithmetic. It tries a smaller train.micro_batch, more engine.activation_checkpointing, an engine that
shards more, engine.offload and each vocab.parallel, separately and combined.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from data_prep.overrides import shown
from launch.hardware import GIB, Hardware
from launch.planner import Plan, Size
from launch.step import total
from pretrain.config.job import JobConfig

CHECKPOINTING = ("none", "selective", "block")  # from the most memory to the least


@dataclass(frozen=True)
class Change:
    """A training with changed settings."""

    settings: tuple[str, ...]  # as on the command line
    config: JobConfig  # with these settings

    @property
    def cost(self) -> tuple[bool, int]:
        """True if it offloads (tokens/s leave out the traffic to the host), and the number of changed settings.

        Another engine counts twice, because `engine=` must replace the one on the command line.
        """
        offloads = any(setting.startswith("engine.offload=") for setting in self.settings)
        return offloads, len(self.settings) + any(setting.startswith("engine=") for setting in self.settings)


@dataclass(frozen=True)
class Fit:
    """Peak memory and speed of a rank with these settings."""

    settings: tuple[str, ...]
    bytes: int
    tokens_per_second: float

    def __str__(self) -> str:
        figures = f"{self.bytes / GIB:.1f} GiB, {self.tokens_per_second:,.0f} tokens/s per rank"
        return f"{shown(*self.settings)} ({figures})"


def refusal(config: JobConfig, world: int, planned: Callable[[JobConfig], Plan], gpu: str, card: Hardware) -> str:
    """Returns why the GPU cannot hold the training, and which settings fit; "" if it can."""
    needs, room = total(planned(config).chosen.memory), card.memory - card.reserved
    if needs <= room:
        return ""
    cannot = f"a rank would hold {needs / GIB:.1f} GiB, cluster.gpu={gpu} has room for {room / GIB:.1f}"
    found = fitting(config, world, planned, room)
    if found is None:
        return (
            f"{cannot}; no other train.micro_batch, engine or vocab.parallel fits: give more ranks or a smaller model"
        )
    return f"{cannot}; this fits: {found}"


def fitting(config: JobConfig, world: int, planned: Callable[[JobConfig], Plan], room: int) -> Fit | None:
    """Returns the fewest changes that fit `room` bytes; of several the fastest. Offloads only if nothing else fits."""
    changes = sorted(_changes(config, world), key=lambda change: change.cost)
    fits: defaultdict[tuple[bool, int], list[Fit]] = defaultdict(list)
    costs = {change.cost for change in changes}
    for offloads, count in sorted(costs | {(offloads, count + 1) for offloads, count in costs}):
        for change in (candidate for candidate in changes if candidate.cost == (offloads, count)):
            plan = planned(change.config)
            for size in plan.sizes:
                own = size.ranks == plan.chosen.ranks
                settings = change.settings if own else (*change.settings, f"vocab.parallel={size.ranks}")
                fit = Fit(settings, total(size.memory), plan.tokens / sum(size.seconds))
                if fit.bytes <= room:
                    fits[offloads, count + (not own)].append(fit)
        if found := fits[offloads, count]:
            return max(found, key=lambda fit: fit.tokens_per_second)
    return None


def _changes(config: JobConfig, world: int) -> Iterator[Change]:
    """Yields every combination of changes; the first is no change."""
    smaller = [n for n in _micro_batches(config, world) if n < config.train.micro_batch]
    kinds = CHECKPOINTING[CHECKPOINTING.index(config.engine.activation_checkpointing) + 1 :]
    offloads = ["cpu"] if config.engine.offload == "none" and config.optim.can_offload else []
    engines = [(None, config.engine), *config.engine.sharding_more()]
    options = [None, *smaller], [None, *kinds], engines, [None, *offloads]
    for micro, kind, (setting, engine), offload in product(*options):
        if offload and not engine.can_offload:
            continue
        given = [("train.micro_batch", micro), ("engine.activation_checkpointing", kind), ("engine.offload", offload)]
        engine = replace(
            engine,
            activation_checkpointing=kind or engine.activation_checkpointing,
            offload=offload or engine.offload,
        )
        train = replace(config.train, micro_batch=micro or config.train.micro_batch)
        chosen = tuple(f"{key}={value}" for key, value in given if value is not None)
        settings = chosen if setting is None else (setting, *chosen)
        yield Change(settings, replace(config, engine=engine, train=train))


def larger(config: JobConfig, world: int, planned: Callable[[JobConfig], Plan], room: int) -> str:
    """Returns the fastest larger train.micro_batch and its gain; "" unless half of the memory is unused."""
    plan = planned(config)
    needs, speed = total(plan.chosen.memory), plan.tokens / sum(plan.chosen.seconds)
    if needs > room / 2:
        return ""
    empty = f"{(room - needs) / GIB:.1f} of {room / GIB:.1f} GiB stay unused"
    found = []
    for micro in _micro_batches(config, world):
        if micro <= config.train.micro_batch:
            continue
        wider = planned(replace(config, train=replace(config.train, micro_batch=micro))).chosen
        fit = Fit((f"train.micro_batch={micro}",), total(wider.memory), plan.tokens / sum(wider.seconds))
        if fit.bytes <= room and fit.tokens_per_second >= speed:
            found.append((fit, _sent(wider)))
    if not found:
        return f"{empty}; no larger train.micro_batch is predicted to fit this train.global_batch and to be faster"
    best, sent = max(found, key=lambda pair: pair[0].tokens_per_second)
    gain = f"{best.tokens_per_second / speed - 1:.1%} more"
    if sent < _sent(plan.chosen):
        gain += f", and {1 - sent / _sent(plan.chosen):.0%} less traffic"
    return f"{empty}; this fits too: {best}: {gain}"


def _sent(size: Size) -> float:
    return sum(transfer.sent for transfer in size.links)


def _micro_batches(config: JobConfig, world: int) -> list[int]:
    """Returns the micro-batch sizes that divide the batch of each rank."""
    samples = config.train.global_batch // world
    return [n for n in range(1, samples + 1) if samples % n == 0]
