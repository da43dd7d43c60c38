"""Kernels that the loss computes with on one device."""

from .base import Kernels
from .choose import choose_kernels

__all__ = ["Kernels", "choose_kernels"]
