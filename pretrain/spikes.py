"""Finds spikes of loss and gradient norm. Apart from hooks/guard.py, because it needs neither torch nor a run."""

import math
from collections import deque

import numpy as np

SIGMA_OF_MAD = 1.4826  # standard deviation / median absolute deviation, of a normal distribution
LEAST_LOSS, LEAST_NORM = 0.02, 0.5  # smallest sigma: in nats, and of the log of the norm: 6 of them are a factor of 20


class Spikes:
    """The last steps' losses and logs of gradient norms, and whether another step is far above them.

    Median and median absolute deviation ignore up to half of the values, so spikes in the window do not hide others
    (Leys et al., "Detecting outliers", 2013). Only values above the median are spikes. Norms are compared as logs,
    because they vary by factors.
    """

    def __init__(self, window: int, threshold: float) -> None:
        self.threshold = threshold
        self.losses: deque[float] = deque(maxlen=window)
        self.norms: deque[float] = deque(maxlen=window)  # natural logs

    def add(self, loss: float, norm: float) -> None:
        self.losses.append(loss)
        self.norms.append(_log(norm))

    def clear(self) -> None:
        self.losses.clear()
        self.norms.clear()

    @property
    def full(self) -> bool:
        return len(self.losses) == self.losses.maxlen

    @property
    def usual_norm(self) -> float:
        """Median norm of the window, which must not be empty."""
        return math.exp(_median(np.array(self.norms)))

    def found(self, loss: float, norm: float) -> str:
        """Describes why a step is a spike; "" if it is not. While the window fills, only numbers that are not finite
        are spikes.
        """
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"loss {loss:.4g}, gradient norm {norm:.4g}"
        if not self.full:
            return ""
        loss_sigmas, loss_median = _distance(loss, self.losses, LEAST_LOSS)
        norm_sigmas, log_median = _distance(_log(norm), self.norms, LEAST_NORM)
        high = []
        if loss_sigmas > self.threshold:
            high.append(f"loss {loss:.4g} (median {loss_median:.4g}, {loss_sigmas:.1f} sigmas)")
        if norm_sigmas > self.threshold:
            high.append(f"gradient norm {norm:.4g} (median {math.exp(log_median):.4g}, {norm_sigmas:.1f} sigmas)")
        return ", ".join(high)


def _distance(value: float, window: deque[float], least: float) -> tuple[float, float]:
    """Distance of the value from the window's median, in robust standard deviations of at least `least`; the median."""
    values = np.array(window)
    median = _median(values)
    return (value - median) / max(least, SIGMA_OF_MAD * _median(np.abs(values - median))), median


def _median(values: np.ndarray) -> float:
    """The same as np.median, in a fifth of its time: each step needs four."""
    middle = np.sort(values)[(len(values) - 1) // 2 : len(values) // 2 + 1]
    return float(middle.sum() / len(middle))


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-30))
