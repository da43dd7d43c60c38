"""Kernels of the loss: what one rank computes on its device."""

from .base import Kernels
from .choose import choose_kernels

__all__ = ["Kernels", "choose_kernels"]
