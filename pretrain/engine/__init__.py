"""Engines: what shards and steps the body."""

from .base import FIRST_MOMENT, SECOND_MOMENT, Engine

__all__ = ["FIRST_MOMENT", "SECOND_MOMENT", "Engine"]
