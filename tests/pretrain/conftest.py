"""Fixtures used in several folders."""

from tests.browser import browser

__all__ = ["browser"]
