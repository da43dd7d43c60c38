"""What a run tells while it trains."""

from .embedding_health import BINS, EmbeddingHealth
from .metrics import LogConfig, MetricsLog
from .seen import SEEN, Seen
from .settings import MonitorConfig
from .tie_drift import TieDrift

__all__ = ["BINS", "SEEN", "EmbeddingHealth", "LogConfig", "MetricsLog", "MonitorConfig", "Seen", "TieDrift"]
