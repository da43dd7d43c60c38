"""Engines: what shards and steps the body."""

from .base import Engine

__all__ = ["Engine"]
