"""Finds the settings in which the runs of a sweep differ."""

from collections.abc import Sequence
from typing import NamedTuple

from ..changes import NOT_COMPARED, text
from .runs import SweepRun

LEARNING_RATE = "optim.lr"
FIRST = (
    "model.family",
    "model.width",
    "model.layers",
    "train.steps",
    "train.global_batch",
    "optim.name",
    LEARNING_RATE,
)
FOLLOWS = {  # set by default from another setting
    "optim.warmup_steps": "train.steps",
    "train.seq_len": "model.context",
}
ABSENT = "–"


class Difference(NamedTuple):
    """A setting that is not the same in all runs."""

    key: str
    values: list[str]  # different ones
    follows: str  # a setting before it that changes together with it; "" if none does


def value_of(run: SweepRun, key: str) -> str:
    return text(run.settings[key]) if key in run.settings else ABSENT


def differences(runs: Sequence[SweepRun]) -> list[Difference]:
    """Returns the settings that differ, the most important first; without those that cannot change a loss.

    A setting follows another if each value of one comes with one value of the other: the runs cannot tell their
    effects apart.
    """
    keys = {key for run in runs for key in run.settings if key != "run.dir" and not key.startswith(NOT_COMPARED)}
    columns = {key: [value_of(run, key) for run in runs] for key in keys}
    different = [key for key in keys if len(set(columns[key])) > 1]
    found: list[Difference] = []
    for key in sorted(different, key=lambda key: (FIRST.index(key) if key in FIRST else len(FIRST), key)):
        own = columns[key]
        follows = ""
        for other in (difference.key for difference in found if not difference.follows):
            pairs = len(set(zip(columns[other], own, strict=True)))
            if pairs == len(set(columns[other])) and (pairs == len(set(own)) or FOLLOWS.get(key) == other):
                follows = other
                break
        found.append(Difference(key, sorted(set(own), key=_by_number), follows))
    return found


def _by_number(value: str) -> tuple[float, str]:
    try:
        return float(value), value
    except ValueError:
        return float("inf"), value


def own(found: Sequence[Difference], *without: str) -> list[str]:
    """The keys of the settings that follow no other."""
    return [difference.key for difference in found if not difference.follows and difference.key not in without]


def label(run: SweepRun, keys: Sequence[str]) -> str:
    """Names a run by these settings, in short: lr=0.001 if no other key ends in lr. "all runs" without any."""
    ends = [key.rpartition(".")[2] for key in keys]
    names = [end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)]
    return ", ".join(f"{name}={value_of(run, key)}" for name, key in zip(names, keys, strict=True)) or "all runs"
