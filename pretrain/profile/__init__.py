"""Traces of training steps: their folder, and what they say. Not part of the hook, because reading needs no torch."""

from .trace import SUFFIX, Row, TraceSummary, read_trace, trace_folder, traces

__all__ = ["SUFFIX", "Row", "TraceSummary", "read_trace", "trace_folder", "traces"]
