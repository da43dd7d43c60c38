"""What a run tells while it trains."""

from .metrics import LogConfig, MetricsLog

__all__ = ["LogConfig", "MetricsLog"]
