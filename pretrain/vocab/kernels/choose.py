"""Chosen once, when building: the mathematics never asks where it runs."""

import importlib.util

import torch

from .base import Kernels
from .torch import TorchKernels


def choose_kernels(device: torch.device) -> Kernels:
    """Triton's on a CUDA device where Triton is installed, else torch's."""
    if device.type == "cpu":
        return TorchKernels()
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from .triton import TritonKernels

        return TritonKernels()
    return TorchKernels(slab_bytes=2**28, memory_mib=896)  # few launches instead of a small cache
