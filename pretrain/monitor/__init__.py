"""Metrics of a run: how they are measured on the matrix, named, and written to files."""

from .metrics import MetricsLog
from .rows import BINS, EDGES, Rows, blocks

__all__ = ["BINS", "EDGES", "MetricsLog", "Rows", "blocks"]
