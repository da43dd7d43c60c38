"""Fits the scaling law L(N, D) = E + A / N^alpha + B / D^beta to the losses of runs.

The law, its objective and its use are those of Hoffmann et al., Training Compute-Optimal Large Language Models (2022,
arXiv:2203.15556), approach 3. N: parameters, D: training tokens, L: loss in nats per token.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NEEDED, NEEDED_EACH = 9, 3  # points; different N, and different D. The law has five constants
DELTA = 1e-3  # of the Huber loss on log L, as in the paper
STARTS = 16  # of L-BFGS
RESAMPLES = 100  # of the bootstrap, as in the paper
LOW, HIGH = 10, 90  # percentiles of the intervals, as in the paper
LARGEST_EXPONENT = 3.0
FLOPS = 6.0  # per parameter and token: forward and backward


class Point(NamedTuple):
    """One run."""

    parameters: float
    tokens: float
    loss: float


class Law(NamedTuple):
    """The constants."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss(self, parameters: float, tokens: float) -> float:
        return float(self.E + self.A * parameters**-self.alpha + self.B * tokens**-self.beta)

    def optimum(self, flops: float) -> tuple[float, float]:
        """Returns the N and D of the lowest loss with 6·N·D = flops (equation 4 of the paper)."""
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        product = flops / FLOPS
        parameters = ratio * product ** (self.beta / (self.alpha + self.beta))
        return parameters, product / parameters


class Fit(NamedTuple):
    """A fitted law, and the laws of the bootstrap."""

    law: Law
    resampled: list[Law]
    error: float  # root mean square of log(fitted / measured)

    def interval(self, values: Sequence[float]) -> tuple[float, float]:
        """Returns the percentiles LOW and HIGH of a value of each resampled law."""
        low, high = np.percentile(np.array(values), [LOW, HIGH])
        return float(low), float(high)

    @property
    def doubt(self) -> str:
        """Why the law must not be used beyond the runs; "" if nothing speaks against it."""
        for name, what in (("alpha", "parameters"), ("beta", "tokens")):
            low, high = self.interval([getattr(law, name) for law in self.resampled])
            if low < 0.01 or high > 0.99 * LARGEST_EXPONENT or not 0.01 <= getattr(self.law, name) < LARGEST_EXPONENT:
                return f"the runs do not determine {name}: its interval is {low:.2f} to {high:.2f}; vary {what} more"
        if self.error > 0.05:
            return f"the law misses the losses by {self.error:.0%}: other settings than N and D matter here"
        return ""


def missing(points: Sequence[Point]) -> str:
    """Says what a fit needs in addition to these points; "" if they are enough."""
    sizes, lengths = len({point.parameters for point in points}), len({point.tokens for point in points})
    if len(points) >= NEEDED and min(sizes, lengths) >= NEEDED_EACH:
        return ""
    return (
        f"A fit needs at least {NEEDED} finished runs with different pairs of N and D, with {NEEDED_EACH} different N"
        f" and {NEEDED_EACH} different D; here are {len(points)}, with {sizes} N and {lengths} D."
    )


def fit(points: Sequence[Point], resamples: int = RESAMPLES, seed: int = 0) -> Fit:
    """Fits the law. Raises ValueError if there are too few points, ImportError without scipy.

    The constants minimise the sum of Huber(log L(N, D) - log L), found by L-BFGS. The paper starts it from a grid of
    all five constants. Here a start is a pair of exponents with its best E, A and B by non-negative least squares; the
    fit is the best of 16. The intervals are percentiles over samples of the points with replacement; a sample with too
    few different points is drawn again.
    """
    if lacking := missing(points):
        raise ValueError(lacking)
    data, random = np.array(points, dtype=np.float64), np.random.default_rng(seed)
    law = _best(data, _starts(data))
    resampled: list[Law] = []
    while len(resampled) < resamples:
        sample = data[random.integers(len(data), size=len(data))]
        distinct = np.unique(sample, axis=0)
        if len(distinct) > len(Law._fields) and min(len(np.unique(distinct[:, k])) for k in (0, 1)) >= NEEDED_EACH:
            resampled.append(_best(sample, [law, *_starts(sample, count=2)]))
    errors = [math.log(law.loss(*point[:2]) / point[2]) for point in data]
    return Fit(law, resampled, math.sqrt(sum(error**2 for error in errors) / len(errors)))


def _starts(data: np.ndarray, count: int = STARTS) -> list[Law]:
    """The most promising pairs of exponents, with their E, A and B."""
    from scipy.optimize import nnls  # only here: it takes half a second

    parameters, tokens, losses = data.T
    found = []
    for alpha in np.arange(0.1, 1.25, 0.1):
        for beta in np.arange(0.1, 1.25, 0.1):
            columns = np.stack([np.ones_like(losses), _power(parameters, alpha), _power(tokens, beta)], axis=1)
            weights, error = nnls(columns / losses[:, None], np.ones_like(losses))
            E, A, B = np.maximum(weights, 1e-6)  # a start needs logarithms
            law = Law(E, A * _middle(parameters) ** alpha, alpha, B * _middle(tokens) ** beta, beta)
            found.append((error, law))
    return [law for _, law in sorted(found)[:count]]


def _middle(values: np.ndarray) -> float:
    return float(np.exp(np.log(values).mean()))


def _power(values: np.ndarray, exponent: float) -> np.ndarray:
    return (values / _middle(values)) ** -exponent


def _best(data: np.ndarray, starts: Sequence[Law]) -> Law:
    """Minimises the objective from each start; returns the best law.

    The variables are the logarithms of E and of the two other terms at the mean of log N and log D, and the exponents:
    so they are of one size and hardly correlated.
    """
    from scipy.optimize import minimize

    parameters, tokens, losses = np.log(data).T
    n, d = parameters.mean(), tokens.mean()

    def objective(variables: np.ndarray) -> tuple[float, np.ndarray]:
        e, a, b, alpha, beta = variables
        terms = np.stack([np.full_like(losses, e), a - alpha * (parameters - n), b - beta * (tokens - d)])
        fitted = np.logaddexp.reduce(terms)
        residual = fitted - losses
        slope = np.clip(residual, -DELTA, DELTA)
        value = np.sum(np.where(np.abs(residual) <= DELTA, residual**2 / 2, DELTA * (np.abs(residual) - DELTA / 2)))
        shares = np.exp(terms - fitted) * slope  # the gradient by each term
        e_, a_, b_ = shares.sum(axis=1)
        gradient = np.array([e_, a_, b_, -shares[1] @ (parameters - n), -shares[2] @ (tokens - d)])
        return value / DELTA, gradient / DELTA

    bounds = np.array([(-20.0, 10.0)] * 3 + [(0.0, LARGEST_EXPONENT)] * 2)
    found = []
    for law in starts:
        a, b = math.log(law.A) - law.alpha * n, math.log(law.B) - law.beta * d
        first = np.array([math.log(law.E), a, b, law.alpha, law.beta])
        done = minimize(
            objective,
            np.clip(first, bounds[:, 0], bounds[:, 1]),
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"maxiter": 300, "ftol": 1e-11, "gtol": 1e-9},
        )
        found.append((float(done.fun), tuple(map(float, done.x))))
    _, (e, a, b, alpha, beta) = min(found)
    return Law(math.exp(e), math.exp(a + alpha * n), alpha, math.exp(b + beta * d), beta)
