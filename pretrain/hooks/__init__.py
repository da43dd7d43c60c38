"""Hooks around the steps of a run: a module per hook, and the registry of those that a run has."""

from .base import Hook, Run, StepReport

__all__ = ["Hook", "Run", "StepReport"]
