"""What a run tells while it trains."""

from .metrics import LogConfig, MetricsLog
from .tie_drift import TieDrift

__all__ = ["LogConfig", "MetricsLog", "TieDrift"]
