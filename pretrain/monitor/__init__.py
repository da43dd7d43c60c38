"""What a run tells while it trains."""

from .embedding_health import BINS, EDGES, EmbeddingHealth
from .metrics import MetricsLog
from .seen import SEEN, Seen
from .tie_drift import TieDrift

__all__ = ["BINS", "EDGES", "SEEN", "EmbeddingHealth", "MetricsLog", "Seen", "TieDrift"]
