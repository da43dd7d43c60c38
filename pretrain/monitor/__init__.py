"""Metrics that a run reports while it trains."""

from .metrics import MetricsLog
from .rows import BINS, EDGES, Rows, blocks

__all__ = ["BINS", "EDGES", "MetricsLog", "Rows", "blocks"]
