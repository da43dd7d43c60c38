"""The text and numbers of a picture, from what the lens has measured: R layers, N positions, k guesses per cell."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .lens import FINAL, FROM_INPUT, FROM_OUTPUT, TOKEN, LensResult
from .method import INPUTS

Facts = list[tuple[str, str]]  # names and what stands for them
CAP = 99  # percentile of the values at which the colours end
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
class Heatmap:
    """A number per cell, [R, N]. Colours run from `low` to `high`, on a logarithmic scale with `log`; `scale` says this
    in words.
    """

    key: str
    title: str
    about: str
    unit: str
    colours: str
    values: np.ndarray
    low: float
    high: float
    scale: str
    log: bool = False


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


def layer_name(row: str) -> str:
    """The name of a row of the lens on pages and pictures: "input" for what enters the first block."""
    return "input" if row in INPUTS else row


def lens_table(
    found: LensResult,
    title: str,
    facts: Facts,
    columns: list[int],
    first: int,
    name: Callable[[int], str],
    vocab_size: int,
) -> LensTable:
    """The chosen columns of a result that begins at position `first`. `name`: an id's text."""
    reading = found.reading

    def of(values: Tensor) -> np.ndarray:
        return values[:, columns].cpu().numpy()

    tokens, targets = found.tokens.tolist(), found.targets.tolist()
    logits, probabilities, agrees = of(reading.top_logits), of(found.probabilities), of(reading.ranks[..., FINAL]) == 1
    ranks = reading.ranks
    kl_from, kl_to = reading.kl_from, reading.kl_to
    guess = {
        "probability": ("Top guess: probability", probabilities[..., 0], "The probability of the layer's top guess."),
        "logit": ("Top guess: logit", logits[..., 0], "The logit of the layer's top guess."),
    }
    rank = {
        "rank_final": (
            "Rank of the output's guess",
            of(ranks[..., FINAL]),
            "The place of the output's top guess among the layer's guesses; 1 is the top.",
        ),
        "rank_input": (
            "Rank of the input token",
            of(ranks[..., TOKEN]),
            "The place of the token below the column among the layer's guesses; 1 is the top.",
        ),
    }
    kl = {
        "kl_final": (
            "KL(output ‖ layer)",
            of(kl_from[..., FROM_OUTPUT]),
            "How far the layer's distribution is from the output's; 0 is the same.",
        ),
        "kl_input": (
            "KL(input ‖ layer)",
            of(kl_from[..., FROM_INPUT]),
            "How far the layer's distribution is from the input's; 0 is the same.",
        ),
        "kl_final_reverse": (
            "KL(layer ‖ output)",
            of(kl_to[..., FROM_OUTPUT]),
            "As KL(output ‖ layer), weighted by the layer's probabilities.",
        ),
        "kl_input_reverse": (
            "KL(layer ‖ input)",
            of(kl_to[..., FROM_INPUT]),
            "As KL(input ‖ layer), weighted by the layer's probabilities.",
        ),
    }
    views = {
        "probability": _fitted("probability", *guess["probability"], "probability", "guess", low=0.0),
        "logit": _fitted("logit", *guess["logit"], "logit", "guess"),
        **{key: _ranks(key, *rank[key]) for key in rank},
        **{key: _fitted(key, *kl[key], "nats", "distance", low=0.0) for key in kl},
        "entropy": _fitted(
            "entropy",
            "Entropy",
            of(reading.entropy),
            f"How unsure the layer is: 0 is certain, {math.log(vocab_size):.3g} knows nothing.",
            "nats",
            "distance",
        ),
    }
    order = ("probability", "logit", "rank_final", "kl_final", "kl_input", "rank_input", "kl_final_reverse")
    return LensTable(
        title,
        facts,
        [layer_name(row) for row in found.rows],
        [first + column for column in columns],
        [name(tokens[column]) for column in columns],
        [name(targets[column]) if targets[column] >= 0 else "" for column in columns],
        found.right[columns].cpu().numpy(),
        [[[name(id) for id in cell] for cell in row] for row in of(reading.top_ids).tolist()],
        logits,
        probabilities,
        agrees,
        of(found.losses),
        [views[key] for key in (*order, "kl_input_reverse", "entropy")],
    )


def _fitted(
    key: str, title: str, values: np.ndarray, about: str, unit: str, colours: str, low: float | None = None
) -> Heatmap:
    """Colours from `low`, or a low percentile, to a high one, of the layers above the input: the input, and a few far
    values, are so different that they would pale all others.
    """
    fitted = _above_input(values)
    fitted = fitted[np.isfinite(fitted)]
    if not fitted.size:
        return Heatmap(key, title, about, unit, colours, values, 0.0, 1.0, "No value is finite.")
    start = float(np.percentile(fitted, 100 - CAP)) if low is None else low
    end, most = float(np.percentile(fitted, CAP)), float(values[np.isfinite(values)].max())
    if end - start < 1e-6 * max(1.0, abs(start)):
        scale = f"All values above the input are {start:.3g}."
        return Heatmap(key, title, about, unit, colours, values, start, start + 1.0, scale)
    begin = f"{start:.3g}, the {100 - CAP}st percentile" if low is None else f"{start:.3g}"
    scale = f"Colours begin at {begin}, and end at the {CAP}th percentile above the input: {end:.3g}."
    return Heatmap(key, title, about, unit, colours, values, start, end, f"{scale} The largest value is {most:.3g}.")


def _ranks(key: str, title: str, values: np.ndarray, about: str) -> Heatmap:
    """Colours on a logarithmic scale from 1, the top guess."""
    end, most = max(10, math.ceil(np.percentile(_above_input(values), CAP))), int(values.max())
    at = f"the {CAP}th percentile above the input: " if end > 10 else ""
    scale = f"Logarithmic colours begin at 1, and end at {at}{end:,}. The largest rank is {most:,}."
    return Heatmap(key, title, about, "rank", "distance", values, 1, end, scale, log=True)


def _above_input(values: np.ndarray) -> np.ndarray:
    return values[1:] if len(values) > 1 else values


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
