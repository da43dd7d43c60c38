"""Hooks around the steps of a run: one module per hook, and the registry that selects and orders them."""

from .base import Hook, Run, StepReport

__all__ = ["Hook", "Run", "StepReport"]
