"""Engines, which shard and step the body."""

from .base import Engine

__all__ = ["Engine"]
