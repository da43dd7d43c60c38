#!/usr/bin/env python
"""What a run will need: `python launch/plan.py --help`. Nothing is started, and no GPU is asked."""

from dataclasses import dataclass

from launch.hardware import Hardware
from pretrain.config import TrainConfig
from pretrain.vocab import Transfer


@dataclass(frozen=True)
class Item:
    """What a rank holds when it holds most."""

    name: str
    bytes: int
    formula: str


@dataclass(frozen=True)
class Plan:
    """One step of a rank: what it holds at its peak, what it moves, and how long it should take."""

    ranks: int  # to a copy of the matrix
    why: str  # auto's table, "" where there is nothing to say
    memory: list[Item]
    links: list[Transfer]
    seconds: float

    @property
    def peak_bytes(self) -> int:
        return sum(item.bytes for item in self.memory)

    def table(self) -> str:
        return ""


def plan(config: TrainConfig, rows: int, world: int, node: int, hardware: Hardware) -> Plan:
    """For a vocabulary of `rows` on `world` ranks, `node` of them on each node. ValueError where the settings clash."""
    raise NotImplementedError
