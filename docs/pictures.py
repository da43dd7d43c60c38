"""Draws the pictures of README.md, docs/concepts.md and docs/how-it-works.md: `python docs/pictures.py`.

A unit of the canvas is a pixel if the picture is shown 850 pixels wide, as GitHub does; text is at least 12 high.
"""

import math
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pretrain.placement import Workload, transfers  # noqa: E402
from pretrain.vocab import VocabShard  # noqa: E402

WIDTH = 850
INK, SOFT, LINE, PAPER, CARD = "#1f2933", "#52606d", "#cbd2d9", "#ffffff", "#f5f7fa"
RANKS = ("#0067a3", "#007a58", "#8f5f00", "#a83a18")  # strong, for edges and text
TINTS = ("#cfe3f3", "#cdebe2", "#fae7bf", "#f6d5c8")  # the same, for areas
NETWORK, NETWORK_TINT = "#6b4fa3", "#e3dbf3"
SMALL, TEXT, LARGE = 12.5, 13.5, 16


class Canvas:
    """A picture of WIDTH × `height` pixels, y downwards."""

    def __init__(self, height: int) -> None:
        self.figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72, facecolor=PAPER)
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, WIDTH), ylim=(height, 0))
        self.axes.axis("off")

    def box(self, x, y, w, h, fill=CARD, edge=LINE, radius=6, width=1.2, **style) -> None:
        shape = f"round,pad=0,rounding_size={radius}"
        self.axes.add_patch(
            FancyBboxPatch((x, y), w, h, boxstyle=shape, facecolor=fill, edgecolor=edge, linewidth=width, **style)
        )

    def band(self, x, y, w, h, fill, edge, **style) -> None:
        self.axes.add_patch(Rectangle((x, y), w, h, facecolor=fill, edgecolor=edge, linewidth=1.2, **style))

    def text(self, x, y, words, size=SMALL, color=INK, ha="center", va="center", **style) -> None:
        self.axes.text(x, y, words, fontsize=size, color=color, ha=ha, va=va, linespacing=1.35, **style)

    def arrow(self, start, end, color=SOFT, style="-|>", width=1.5) -> None:
        self.axes.add_patch(
            FancyArrowPatch(
                start, end, arrowstyle=style, mutation_scale=11, color=color, linewidth=width, shrinkA=0, shrinkB=0
            )
        )

    def bus(self, x, y, w, h, title, words) -> None:
        """A wire between all ranks, and what is on it."""
        self.box(x, y, w, h, NETWORK_TINT, NETWORK, radius=h / 2)
        self.text(x + 18, y + h / 2, title, TEXT, NETWORK, ha="left", weight="bold")
        self.text(x + w - 18, y + h / 2, words, SMALL, INK, ha="right")

    def save(self, path: Path) -> None:
        with matplotlib.rc_context({"svg.hashsalt": path.name, "svg.fonttype": "path"}):
            self.figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def matrix(canvas: Canvas, x: float, y: float, w: float, h: float, padding: float = 0) -> None:
    """The whole matrix, a band for each of four ranks."""
    each = h / 4
    for r in range(4):
        canvas.band(x, y + r * each, w, each, TINTS[r], RANKS[r])
    if padding:
        canvas.band(x, y + h - padding, w, padding, "#ffffff", RANKS[3], hatch="////")


def at_a_glance() -> Canvas:
    """README: what is split, what each rank has of its own, and what crosses."""
    canvas = Canvas(452)
    canvas.text(96, 26, "one matrix", LARGE, weight="bold")
    canvas.text(532, 26, "four ranks, each with its own tokens", LARGE, weight="bold")
    top, height = 62, 336
    canvas.text(109, top - 12, "width D", SMALL, SOFT)
    canvas.text(24, top + height / 2, "V rows, one per token id", SMALL, SOFT, rotation=90)
    matrix(canvas, 46, top, 126, height)
    edges = VocabShard.of(0, 4, 128_256).edges
    for r in range(4):
        middle = top + (r + 0.5) * height / 4
        canvas.text(109, middle - 9, "rows", SMALL, RANKS[r])
        canvas.text(109, middle + 9, f"{edges[r]:,} – {edges[r + 1] - 1:,}", SMALL, INK)

    left, step, w = 222, 154, 142
    texts = ("The cat sat on", "def read(path):", "Es war einmal", "x = −b / 2a")
    for r, words in enumerate(texts):
        x = left + r * step
        middle = x + w / 2
        canvas.box(x, 48, w, 350, "#ffffff", LINE, radius=10)
        canvas.text(middle, 66, f"rank {r}", TEXT, RANKS[r], weight="bold")
        canvas.text(middle, 93, words, SMALL, INK, family="monospace")
        canvas.text(middle, 112, "own tokens", SMALL, SOFT)
        canvas.arrow((middle, 124), (middle, 142))
        canvas.arrow((middle, 174), (middle, 190))
        canvas.box(x + 12, 192, w - 24, 52, CARD, SOFT)
        canvas.text(middle, 208, "body", TEXT, INK, weight="bold")
        canvas.text(middle, 228, "FSDP2 or ZeRO", SMALL, SOFT)
        canvas.arrow((middle, 246), (middle, 264))
        canvas.arrow((middle, 296), (middle, 312))
        canvas.box(x + 12, 314, w - 24, 72, TINTS[r], RANKS[r])
        canvas.text(middle, 330, "own rows", TEXT, RANKS[r], weight="bold")
        canvas.text(middle, 350, "logits, softmax,", SMALL)
        canvas.text(middle, 368, "loss, gradient", SMALL)
    span = 3 * step + w
    canvas.bus(left - 8, 144, span + 16, 29, "lookup", "each distinct row once, its summed gradient back")
    canvas.bus(left - 8, 266, span + 16, 29, "loss", "hidden states, and 3 numbers per token and rank")
    canvas.text(
        WIDTH / 2, 428, "No rank ever holds the whole matrix, or one whole row of logits.", TEXT, INK, weight="bold"
    )
    return canvas


def on_ranks() -> Canvas:
    """Concepts: who owns which rows; dp × vocab."""
    vocab_size, groups, p = 50_257, 2, 4
    canvas = Canvas(462)
    canvas.text(92, 26, "the matrix", LARGE, weight="bold")
    canvas.text(534, 26, "8 ranks = 2 dp × 4 vocab", LARGE, weight="bold")
    shards = [VocabShard.of(r, p, vocab_size) for r in range(p)]
    top, height = 86, 264
    matrix(canvas, 42, top, 100, height, padding=12)
    canvas.text(92, top - 14, f"{shards[0].padded_size:,} rows", SMALL, SOFT)
    for shard, color in zip(shards, RANKS, strict=True):
        canvas.text(92, top + (shard.rank + 0.5) * height / p, f"{shard.rows:,}", SMALL, color)
    padding = shards[0].padded_size - vocab_size
    canvas.text(92, top + height + 19, f"{vocab_size:,} token ids", SMALL, SOFT)
    canvas.text(92, top + height + 38, f"+ {padding} rows of padding", SMALL, SOFT)

    left, step, w, h, gap = 236, 138, 124, 92, 172
    for r, shard in enumerate(shards):
        x = left + r * step
        for group in range(groups):
            y = top + group * gap
            canvas.box(x, y, w, h, TINTS[r], RANKS[r])
            canvas.text(x + w / 2, y + 22, f"rank {group * p + r}", TEXT, RANKS[r], weight="bold")
            canvas.text(x + w / 2, y + 47, f"rows {shard.start:,}", SMALL)
            canvas.text(x + w / 2, y + 67, f"to {shard.stop - 1:,}", SMALL)
        canvas.arrow((x + w / 2, top + h + 3), (x + w / 2, top + gap - 3), NETWORK, "<|-|>", 1.8)
    right = left + (p - 1) * step + w
    for group in range(groups):
        y = top + group * gap
        canvas.box(left - 14, y - 14, right - left + 28, h + 28, "none", SOFT, radius=12, linestyle=(0, (4, 3)))
        canvas.text(left - 46, y + h / 2, f"vocab\ngroup {group}", SMALL, SOFT)
    canvas.box(left + 76, top + h + 25, 386, 28, PAPER, PAPER)
    middle = (left + right) / 2
    canvas.text(middle, top + h + 39, "replicas: one all-reduce of the rows' gradient per step", SMALL, NETWORK)
    below = top + gap + h + 26
    canvas.text(
        middle,
        below + 6,
        "within a group: one copy of the matrix, lookup and loss of every micro-batch",
        SMALL,
        NETWORK,
    )
    canvas.box(left - 14, below + 30, right - left + 28, 34, CARD, SOFT)
    canvas.text(middle, below + 47, "body: split over all 8 ranks by FSDP2 or ZeRO", SMALL)
    return canvas


def one_step() -> Canvas:
    """Concepts: what a rank computes and sends in a step, and in a chunk of the loss."""
    work = Workload(rows=128_256, width=4096, matrices=1, tokens=8192, micro_batches=1, itemsize=2, state=8)
    sent = {one.purpose: one.sent / 2**20 for one in transfers(8, work, world=64)}

    def mib(purpose: str) -> str:
        return f"{sent[purpose]:,.1f} MiB" if sent[purpose] < 100 else f"{sent[purpose]:,.0f} MiB"

    canvas = Canvas(520)
    canvas.text(30, 26, "one step of a rank", LARGE, ha="left", weight="bold")
    for x, fill, edge, words in ((520, CARD, SOFT, "computes"), (640, NETWORK_TINT, NETWORK, "crosses the ranks")):
        canvas.box(x, 18, 18, 16, fill, edge, radius=3)
        canvas.text(x + 26, 26, words, SMALL, SOFT, ha="left")

    blocks = (
        ("lookup", "rows looked up", 90),
        ("body\nforward", None, 104),
        ("loss,\nin chunks", "", 176),
        ("body\nbackward", None, 104),
        ("lookup,\nbackward", "looked-up rows' gradients", 100),
        ("sum over\nreplicas", "replicas' gradients", 100),
        ("clip,\nupdate", None, 82),
    )
    x, y, h = 30.0, 54, 66
    for words, purpose, w in blocks:
        fill, edge = (CARD, SOFT) if purpose is None else (NETWORK_TINT, NETWORK)
        if purpose == "":
            loss = (x, x + w)
            fill, edge = TINTS[0], RANKS[0]
        canvas.box(x, y, w, h, fill, edge)
        canvas.text(x + w / 2, y + h / 2, words, TEXT)
        if purpose:
            canvas.text(x + w / 2, y + h + 16, mib(purpose), SMALL, NETWORK)
        elif purpose is None:
            canvas.text(x + w / 2, y + h + 16, "engine" if "body" in words else "own rows", SMALL, SOFT)
        x += w + 5.5

    left, right, below = 30, 820, 186
    canvas.axes.fill([loss[0], loss[1], right, left], [y + h, y + h, below, below], color=TINTS[0], alpha=0.45, lw=0)
    canvas.box(left, below, right - left, 280, "#fbfdff", RANKS[0], radius=10)
    canvas.text(left + 18, below + 24, "one chunk of the loss", TEXT, RANKS[0], ha="left", weight="bold")
    canvas.text(right - 18, below + 24, "the tokens of all ranks meet the rows of this rank", SMALL, SOFT, ha="right")

    lane = (below + 48, below + 170)
    first, second, third = (196, 386), (394, 574), (626, 806)
    canvas.text(left + 18, lane[0] + 46, "matmuls", TEXT, INK, ha="left", weight="bold")
    canvas.text(left + 18, lane[1] + 46, "network", TEXT, NETWORK, ha="left", weight="bold")
    for (start, stop), title, formula, why in (
        (first, "1", "X · W_rᵀ", "logits on own rows"),
        (second, "2", "E_r · W_r", "needs no normaliser"),
        (third, "3", "E_rᵀ · αX", "gradient of own rows"),
    ):
        middle = (start + stop) / 2
        canvas.box(start, lane[0], stop - start, 92, "#ffffff", SOFT)
        canvas.text(middle, lane[0] + 20, f"matmul {title}", TEXT, weight="bold")
        canvas.text(middle, lane[0] + 46, _formula(formula), 16)
        canvas.text(middle, lane[0] + 73, why, SMALL, SOFT)
    canvas.box(582, lane[0], 36, 92, TINTS[0], RANKS[0])
    canvas.text(600, lane[0] + 46, "merge", SMALL, RANKS[0], rotation=90, weight="bold")
    for (start, stop), what, purpose in (
        (first, "hidden states X\nof the next chunk", "hidden states"),
        (second, "3 numbers\nper token and rank", "softmax statistics"),
        (third, "gradient of the\nhidden states", "hidden states' gradients"),
    ):
        middle = (start + stop) / 2
        canvas.box(start, lane[1], stop - start, 92, NETWORK_TINT, NETWORK)
        canvas.text(middle, lane[1] + 32, what, SMALL)
        canvas.text(middle, lane[1] + 72, mib(purpose), SMALL, NETWORK, weight="bold")
    canvas.arrow((first[1] - 14, lane[0] + 93), (second[0] + 18, lane[1] - 1), NETWORK)
    canvas.arrow((second[1] - 18, lane[1] - 1), (594, lane[0] + 93), NETWORK)
    canvas.arrow((608, lane[0] + 93), (third[0] + 18, lane[1] - 1), NETWORK)
    canvas.text(
        left,
        492,
        "MiB that a rank sends for its 8,192 tokens, in all chunks together. 128,256 rows of width 4,096 in bf16;\n"
        "8 ranks share a copy, 64 ranks in all.",
        SMALL,
        SOFT,
        ha="left",
    )
    return canvas


def softmax_of_two_shards() -> Canvas:
    """How it works: one token's logits on two ranks, what they exchange, and the softmax that it gives."""
    logits, target = ((1.0, 3.0, 0.5, 2.0), (-1.0, 0.0, 4.0, 1.5)), 1
    largest = [max(z) for z in logits]
    exp = [[math.exp(x - a) for x in z] for z, a in zip(logits, largest, strict=True)]
    sums = [sum(e) for e in exp]
    top = max(largest)
    lse = top + math.log(sum(s * math.exp(a - top) for s, a in zip(sums, largest, strict=True)))
    alpha = [math.exp(a - lse) for a in largest]

    canvas = Canvas(452)
    columns = (30, 312, 594)
    for x, title, formula in zip(
        columns,
        ("step 2: logits", "step 2: exponentials", "step 4: softmax"),
        ("z", "E_r", r"\alpha_r E_r"),
        strict=True,
    ):
        canvas.text(x, 26, title, LARGE, ha="left", weight="bold")
        canvas.text(x + 226, 26, f"${formula}$", LARGE, SOFT, ha="right")

    base, scale, step, w = 190, 26, 27, 20
    for r in range(2):
        for i in range(4):
            hollow = r == 0 and i == target
            for column, value, unit in (
                (0, logits[r][i], scale),
                (1, exp[r][i], 4 * scale),
                (2, alpha[r] * exp[r][i], 4 * scale),
            ):
                x = columns[column] + r * (4 * step + 14) + i * step
                style = {"linestyle": (0, (3, 2))} if hollow and column else {}
                fill = "#ffffff" if hollow and column else TINTS[r]
                canvas.band(x, base - unit * value, w, unit * value, fill, RANKS[r], **style)
                canvas.text(x + w / 2, base + 42, str(4 * r + i), SMALL, SOFT)
                if hollow and column == 0:
                    canvas.text(x + w / 2, base + 62, "y", TEXT, INK, weight="bold")
        start = columns[0] + r * (4 * step + 14)
        height = base - scale * largest[r]
        canvas.axes.plot([start - 4, start + 4 * step - 3], [height, height], color=RANKS[r], lw=1, ls=(0, (4, 3)))
        canvas.text(start + 2 * step - 4, height - 12, f"$a_{r}$ = {largest[r]:.2f}", SMALL, RANKS[r])
        for column, words in (
            (0, f"rank {r}"),
            (1, f"$s_{r}$ = {sums[r]:.2f}"),
            (2, f"$\\alpha_{r}$ = {alpha[r]:.2f}"),
        ):
            x = columns[column] + r * (4 * step + 14) + 2 * step - 4
            canvas.text(x, base + (82 if column == 0 else 64), words, SMALL, RANKS[r], weight="bold")
    for x in columns:
        canvas.axes.plot([x - 4, x + 230], [base, base], color=SOFT, lw=1)

    y = 306
    for r in range(2):
        t = f"{logits[0][target]:.2f}" if r == 0 else "0"
        words = f"$a_{r}$ = {largest[r]:.2f},  $s_{r}$ = {sums[r]:.2f},  $t_{r}$ = {t}"
        canvas.box(columns[0], y + r * 44, 240, 34, TINTS[r], RANKS[r])
        canvas.text(columns[0] + 120, y + r * 44 + 17, words, TEXT)
        canvas.arrow((columns[0] + 242, y + r * 44 + 17), (columns[1] + 14, y + 39 + (r - 0.5) * 16), NETWORK)
    canvas.box(columns[1] + 16, y + 4, 188, 70, NETWORK_TINT, NETWORK)
    canvas.text(columns[1] + 110, y + 28, "step 3: exchanged", SMALL, NETWORK, weight="bold")
    canvas.text(columns[1] + 110, y + 50, "3 numbers per token, rank", SMALL)
    canvas.arrow((columns[1] + 206, y + 39), (columns[2] - 18, y + 39), NETWORK)
    canvas.box(columns[2] - 16, y, 246, 78, TINTS[0], RANKS[0])
    canvas.text(columns[2] + 107, y + 24, f"step 4: lse = {lse:.2f}", TEXT)
    canvas.text(columns[2] + 107, y + 54, f"loss = lse − $t_0$ = {lse - logits[0][target]:.2f}", TEXT, weight="bold")
    canvas.text(
        30,
        426,
        "8 token ids on 2 ranks; the target y is id 1. Its place (dashed) stays 0 in $E_r$, and is added in fp32.",
        SMALL,
        SOFT,
        ha="left",
    )
    return canvas


def _formula(plain: str) -> str:
    """Mathematics for matplotlib, from the plain text beside it."""
    return "$" + plain.replace("ᵀ", r"^{\top}").replace("·", r"\,").replace("α", r"\alpha ") + "$"


PICTURES = {
    "rowshard": at_a_glance,
    "matrix-on-ranks": on_ranks,
    "step-traffic": one_step,
    "two-shards": softmax_of_two_shards,
}


def draw(folder: Path, suffix: str = ".svg") -> list[Path]:
    """Writes all pictures to `folder`; returns their paths."""
    paths = [folder / f"{name}{suffix}" for name in PICTURES]
    for path, picture in zip(paths, PICTURES.values(), strict=True):
        picture().save(path)
    return paths


if __name__ == "__main__":
    for written in draw(Path(__file__).resolve().parent):
        print(written.relative_to(ROOT))
