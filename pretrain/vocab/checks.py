"""Checks of tensors' values within a step.

Not part of loss.py: a rehearsal, whose tensors have no values, must be able to skip them all.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_skipped = False


def violated(condition: Tensor) -> bool:
    """Returns True if the condition, one bool, is False.

    On CUDA, where reading it would stall the host, the device asserts it and this returns False.
    """
    if _skipped:
        return False
    if condition.is_cuda:
        torch._assert_async(condition)
        return False
    return not condition


@contextmanager
def checks_skipped() -> Iterator[None]:
    """Takes all conditions for met while this lasts, without reading them: for tensors that have no values."""
    global _skipped
    before, _skipped = _skipped, True
    try:
        yield
    finally:
        _skipped = before
