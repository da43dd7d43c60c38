"""The text and numbers of a picture, from what the lens has measured: R layers, N positions, k guesses per cell."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .lens import FINAL, FROM_INPUT, FROM_OUTPUT, TOKEN, LensResult
from .method import layer_name

Facts = list[tuple[str, str]]  # names and what stands for them
CAP = 99  # percentile of the values at which the colours end
LEAST_RANK = 10  # at which the colours of a rank may end
COLOURS = {  # from a view's low end to its high end, on light and on dark pages
    "guess": {
        "light": ["#f3f7f4", "#cfe8dc", "#93cfc0", "#55b0ae", "#2f8a9c", "#2b6384", "#293e66", "#1b1d3f"],
        "dark": ["#182029", "#1d3c50", "#1f5f74", "#26858a", "#46ab97", "#85cda5", "#c4e8bd", "#f4fbe6"],
    },
    "distance": {
        "light": ["#fcf5ec", "#fbdcb9", "#f7b384", "#ec825f", "#d1525a", "#a13263", "#672057", "#2d1237"],
        "dark": ["#221a22", "#43203c", "#732654", "#a83459", "#d9564f", "#f08a5d", "#f9c08b", "#fdf0d5"],
    },
}


@dataclass(frozen=True)
class View:
    """A measure of the lens, and how it is shown. values: [R, N] of a result."""

    key: str
    title: str
    about: str
    unit: str  # probability, logit, rank or nats
    values: Callable[[LensResult], Tensor]
    low: float | None = 0.0  # the value at which colours begin; None: a low percentile

    @property
    def colours(self) -> str:
        return "guess" if self.unit in ("probability", "logit") else "distance"


VIEWS = (
    View(
        "probability",
        "Top guess: probability",
        "The probability of the layer's top guess.",
        "probability",
        lambda found: found.probabilities[..., 0],
    ),
    View(
        "logit",
        "Top guess: logit",
        "The logit of the layer's top guess.",
        "logit",
        lambda found: found.reading.top_logits[..., 0],
        low=None,
    ),
    View(
        "rank_final",
        "Rank of the output's guess",
        "The place of the output's top guess among the layer's guesses; 1 is the top.",
        "rank",
        lambda found: found.reading.ranks[..., FINAL],
    ),
    View(
        "kl_final",
        "KL(output ‖ layer)",
        "How far the layer's distribution is from the output's; 0 is the same.",
        "nats",
        lambda found: found.reading.kl_from[..., FROM_OUTPUT],
    ),
    View(
        "kl_input",
        "KL(input ‖ layer)",
        "How far the layer's distribution is from the input's; 0 is the same.",
        "nats",
        lambda found: found.reading.kl_from[..., FROM_INPUT],
    ),
    View(
        "rank_input",
        "Rank of the input token",
        "The place of the token below the column among the layer's guesses; 1 is the top.",
        "rank",
        lambda found: found.reading.ranks[..., TOKEN],
    ),
    View(
        "kl_final_reverse",
        "KL(layer ‖ output)",
        "As KL(output ‖ layer), weighted by the layer's probabilities.",
        "nats",
        lambda found: found.reading.kl_to[..., FROM_OUTPUT],
    ),
    View(
        "kl_input_reverse",
        "KL(layer ‖ input)",
        "As KL(input ‖ layer), weighted by the layer's probabilities.",
        "nats",
        lambda found: found.reading.kl_to[..., FROM_INPUT],
    ),
    View(
        "entropy",
        "Entropy",
        "How unsure the layer is: 0 is certain; ln(vocabulary) is a blind guess.",
        "nats",
        lambda found: found.reading.entropy,
        low=None,
    ),
)


@dataclass(frozen=True)
class Heatmap:
    """A number per cell, [R, N]. Colours run from `low` to `high`; `scale` says this in words."""

    view: View
    values: np.ndarray
    low: float
    high: float
    scale: str

    @property
    def key(self) -> str:
        return self.view.key

    @property
    def title(self) -> str:
        """The view's name, with its unit if it has one."""
        return self.view.title + (", nats" if self.view.unit == "nats" else "")

    @property
    def log(self) -> bool:
        return self.view.unit == "rank"


@dataclass(frozen=True)
class LensTable:
    """The content of one picture. layers: the input first, the output last. nexts: the next token of each position, ""
    if there is none. right [N]: the model's guess is the next token. agrees [R, N]: the layer's guess is the output's.
    """

    title: str  # one line
    facts: Facts
    layers: list[str]
    positions: list[int]
    tokens: list[str]
    nexts: list[str]
    right: np.ndarray
    guesses: list[list[list[str]]]  # [R][N][k]
    logits: np.ndarray  # [R, N, k]
    probabilities: np.ndarray  # [R, N, k]
    agrees: np.ndarray
    losses: np.ndarray  # [R, N]
    views: list[Heatmap]


def lens_table(
    found: LensResult,
    title: str,
    facts: Facts,
    columns: list[int],
    first: int,
    name: Callable[[int], str],
) -> LensTable:
    """The chosen columns of a result that begins at position `first`. `name`: an id's text."""

    def of(values: Tensor) -> np.ndarray:
        return values[:, columns].cpu().numpy()

    tokens, targets = found.tokens.tolist(), found.targets.tolist()
    return LensTable(
        title,
        facts,
        [layer_name(row) for row in found.rows],
        [first + column for column in columns],
        [name(tokens[column]) for column in columns],
        [name(targets[column]) if targets[column] >= 0 else "" for column in columns],
        found.right[columns].cpu().numpy(),
        [[[name(id) for id in cell] for cell in row] for row in of(found.reading.top_ids).tolist()],
        of(found.reading.top_logits),
        of(found.probabilities),
        of(found.reading.ranks[..., FINAL]) == 1,
        of(found.losses),
        [heatmap(view, of(view.values(found))) for view in VIEWS],
    )


def heatmap(view: View, values: np.ndarray) -> Heatmap:
    """Fits the colours to the layers above the input, without their largest percent.

    The input, and a few far values, are so different that they would pale all others.
    """
    fitted = values[1:] if len(values) > 1 else values
    fitted = fitted[np.isfinite(fitted)]
    if not fitted.size:
        return Heatmap(view, values, 0.0, 1.0, "No value is finite.")
    end, most = float(np.percentile(fitted, CAP)), float(values[np.isfinite(values)].max())
    cap = f"the {CAP}th percentile above the input: "
    if view.unit == "rank":
        high = max(LEAST_RANK, math.ceil(end))
        scale = f"Logarithmic colours begin at 1, and end at {cap if high > LEAST_RANK else ''}{high:,}."
        return Heatmap(view, values, 1, high, f"{scale} The largest rank is {most:,.0f}.")
    low = float(np.percentile(fitted, 100 - CAP)) if view.low is None else view.low
    if end - low < 1e-6 * max(1.0, abs(low)):
        return Heatmap(view, values, low, low + 1.0, f"All values above the input are {low:.3g}.")
    begin = f"{low:.3g}, the {100 - CAP}st percentile" if view.low is None else f"{low:.3g}"
    scale = f"Colours begin at {begin}, and end at {cap}{end:.3g}. The largest value is {most:.3g}."
    return Heatmap(view, values, low, end, scale)


def visible(data: bytes) -> str:
    """A token's text on one line: shows spaces at its ends, line ends, and bytes that are not text."""
    text = data.decode("utf-8", errors="backslashreplace")
    for control, sign in (("\r", "␍"), ("\n", "↵"), ("\t", "⇥")):
        text = text.replace(control, sign)
    bare = text.strip(" ")
    if not bare:
        return "·" * len(text)
    left = len(text) - len(text.lstrip(" "))
    shown = "·" * left + bare + "·" * (len(text) - left - len(bare))
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in shown)
