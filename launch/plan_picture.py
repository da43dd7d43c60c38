"""Draws a plan: `python launch/plan.py … plot=FILE`. A module of its own, because nothing else needs matplotlib."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from launch.hardware import GIB, Hardware
from launch.planner import Plan, plan
from pretrain.config.job import JobConfig

ROWS = (32_768, 65_536, 131_072, 262_144, 524_288)
MOST_RANKS = 1024
ITEMS = {  # what a rank holds, from the bottom of a bar to its top
    "weights": "#4e79a7",
    "moments": "#86b0d8",
    "gradients": "#59a14f",
    "gathered": "#b6992d",
    "activations": "#d4a6c8",
    "head": "#e15759",
    "lookup": "#f28e2b",
    "lens": "#9c755f",
}


def draw(config: JobConfig, world: int, node: int, hardware: Hardware, path: Path) -> None:
    """Draws memory per rank against the rows, and speed per rank against the ranks; each rank has the same tokens.

    The speed is drawn for worlds of one node and more. Raises ValueError if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(f"plot={path} needs matplotlib: pip install matplotlib") from None
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    memory, speed = figure.subplots(1, 2)
    _memory(memory, [plan(config, rows, world, node, hardware) for rows in ROWS], world, hardware)
    repeats, asked = config.train.global_batch // world, config.vocab.parallel
    worlds = [node * 2**k for k in range(11) if node * 2**k <= max(world, MOST_RANKS)]
    worlds = [size for size in worlds if asked == "auto" or size % int(asked) == 0]
    for rows in ROWS:
        plans = [
            plan(
                replace(config, train=replace(config.train, global_batch=repeats * ranks)), rows, ranks, node, hardware
            )
            for ranks in worlds
        ]
        rates = [point.tokens / point.seconds for point in plans]
        speed.plot(worlds, rates, marker="o", markersize=4, color=_shade(rows), label=f"{rows // 1024}k rows")
    speed.set_xscale("log", base=2)
    speed.set_xticks(worlds, [f"{ranks:,}" for ranks in worlds])
    speed.yaxis.set_major_formatter("{x:,.0f}")
    speed.set(title="estimated tokens/s per rank", xlabel="ranks", ylim=(0, None))
    speed.legend(loc="lower left", fontsize="small", frameon=False)
    for axes in (memory, speed):
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _memory(axes: Any, plans: list[Plan], world: int, hardware: Hardware) -> None:
    """Draws a stack per number of rows, the same without a split of the matrix, and the device's limit."""
    places, bottom = range(len(ROWS)), [0.0] * len(ROWS)
    sizes = [{item.name: item.bytes / GIB for item in point.memory} for point in plans]
    for name, color in ITEMS.items():
        heights = [held.get(name, 0.0) for held in sizes]
        if any(heights):
            axes.bar(places, heights, 0.6, bottom, color=color, label=name)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    whole = [next((size for size in point.sizes if size.ranks == 1), None) for point in plans]
    peaks = [sum(item.bytes for item in size.memory) / GIB for size in whole if size]
    if len(peaks) == len(ROWS) and any(size is not point.chosen for size, point in zip(whole, plans, strict=True)):
        axes.plot(places, peaks, "k_", markersize=26, markeredgewidth=1.8, label="matrix not split")
    if hardware.device == "cuda":
        limit = (hardware.memory - hardware.reserved) / GIB
        axes.axhline(limit, color="#b22222", linestyle="--", linewidth=1.5, label=f"limit, {limit:.0f} GiB")
    axes.set_xticks(places, [f"{rows // 1024}k" for rows in ROWS])
    axes.set(title=f"planned peak memory per rank, GiB ({world:,} ranks)", xlabel="rows of the vocabulary")
    axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], fontsize="small", frameon=False, loc="upper left", bbox_to_anchor=(1, 1))


def _shade(rows: int) -> tuple[float, ...]:
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * ROWS.index(rows) / len(ROWS))
