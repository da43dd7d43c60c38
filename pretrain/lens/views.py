"""Contents of a look, as text and numbers for a picture: R rows, N columns, k guesses a cell."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .lens import FINAL, FROM_INPUT, FROM_OUTPUT, TOKEN, LensResult

MOST_FINAL_RANK, MOST_TOKEN_RANK, MOST_KL = 100, 1000, 30.0  # where the colours end


@dataclass(frozen=True)
class Heatmap:
    """A number a cell, [R, N]; colours run from `low` to `high`, on a logarithmic scale with `log`."""

    key: str
    title: str
    values: np.ndarray
    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class LensTable:
    """One picture's worth. rows: the input first; tokens, nexts: below and above each column, a next one "" where there
    is none; right: where the model's guess is the next token; agrees [R, N]: where a row's guess is the final one.
    """

    title: str
    rows: list[str]
    positions: list[int]
    tokens: list[str]
    nexts: list[str]
    right: np.ndarray
    guesses: list[list[list[str]]]  # [R][N][k]
    logits: np.ndarray  # [R, N, k]
    probabilities: np.ndarray
    agrees: np.ndarray
    losses: np.ndarray  # [R, N]
    views: list[Heatmap]


def sheet(
    found: LensResult, title: str, columns: list[int], first: int, name: Callable[[int], str], vocab_size: int
) -> LensTable:
    """The chosen columns of a look that began at position `first`. `name`: an id's text."""
    reading = found.reading

    def of(values: Tensor) -> np.ndarray:
        return values[:, columns].cpu().numpy()

    tokens, targets = found.tokens.tolist(), found.targets.tolist()
    logits, probabilities, agrees = of(reading.top_logits), of(found.probabilities), of(reading.ranks[..., FINAL]) == 1
    final, token = reading.ranks[..., FINAL], reading.ranks[..., TOKEN]
    views = [
        Heatmap("probability", "Top guess, by probability", probabilities[..., 0], 0.0, 1.0),
        Heatmap("logit", "Top guess, by logit", logits[..., 0], *_span(logits[..., 0])),
        Heatmap("rank_final", "Rank of the final top guess", of(final), 1, MOST_FINAL_RANK, log=True),
        Heatmap("kl_final", "KL(final ‖ layer), nats", of(reading.kl_from[..., FROM_OUTPUT]), 0.0, MOST_KL),
        Heatmap("kl_input", "KL(input ‖ layer), nats", of(reading.kl_from[..., FROM_INPUT]), 0.0, MOST_KL),
        Heatmap("rank_input", "Rank of the input token", of(token), 1, MOST_TOKEN_RANK, log=True),
        Heatmap("kl_final_reverse", "KL(layer ‖ final), nats", of(reading.kl_to[..., FROM_OUTPUT]), 0.0, MOST_KL),
        Heatmap("kl_input_reverse", "KL(layer ‖ input), nats", of(reading.kl_to[..., FROM_INPUT]), 0.0, MOST_KL),
        Heatmap("entropy", "Entropy, nats", of(reading.entropy), 0.0, max(math.log(vocab_size), 1e-9)),
    ]
    return LensTable(
        title,
        found.rows,
        [first + column for column in columns],
        [name(tokens[column]) for column in columns],
        [name(targets[column]) if targets[column] >= 0 else "" for column in columns],
        found.right[columns].cpu().numpy(),
        [[[name(id) for id in cell] for cell in row] for row in of(reading.top_ids).tolist()],
        logits,
        probabilities,
        agrees,
        of(found.losses),
        views,
    )


def _span(values: np.ndarray) -> tuple[float, float]:
    """From the smallest to the largest number, and never nothing."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    return low, high if high > low else low + 1.0


def visible(data: bytes) -> str:
    """A token's text on one line: spaces at its ends and line ends can be seen, and bytes that are no text."""
    text = data.decode("utf-8", errors="backslashreplace")
    for control, sign in (("\r", "␍"), ("\n", "↵"), ("\t", "⇥")):
        text = text.replace(control, sign)
    bare = text.strip(" ")
    if not bare:
        return "·" * len(text)
    left = len(text) - len(text.lstrip(" "))
    shown = "·" * left + bare + "·" * (len(text) - left - len(bare))
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in shown)
