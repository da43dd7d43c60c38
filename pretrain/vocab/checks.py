"""Checks of tensors' values within a step.

They stand apart from loss.py because a rehearsal, whose tensors have no values, must be able to skip them all.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_skipped = False


def violated(condition: Tensor) -> bool:
    """Returns True if the condition, one bool, is False.

    On CUDA, reading it would stall the host. There the device asserts it, and the result is False.
    """
    if _skipped:
        return False
    if condition.is_cuda:
        torch._assert_async(condition)
        return False
    return not condition


@contextmanager
def checks_skipped() -> Iterator[None]:
    """Treats all conditions as met inside the `with` block and does not read them: for tensors without values."""
    global _skipped
    before, _skipped = _skipped, True
    try:
        yield
    finally:
        _skipped = before
