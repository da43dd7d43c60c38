"""What a run tells while it trains."""

from .embedding_health import BINS, EDGES, EmbeddingHealth
from .metrics import LogConfig, MetricsLog
from .seen import SEEN, Seen
from .settings import MonitorConfig
from .tie_drift import TieDrift

__all__ = ["BINS", "EDGES", "SEEN", "EmbeddingHealth", "LogConfig", "MetricsLog", "MonitorConfig", "Seen", "TieDrift"]
