"""Choice of the kernels, made once when the matrix is built: the mathematics does not ask for the device."""

import importlib.util

import torch

from .base import Kernels
from .torch import TorchKernels


def choose_kernels(device: torch.device) -> Kernels:
    """Returns Triton's kernels on a CUDA device if Triton is installed, else torch's."""
    if device.type == "cpu":
        return TorchKernels()
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from .triton import TritonKernels

        return TritonKernels()
    return TorchKernels(slab_bytes=2**28, memory_mib=896)  # large slabs: a GPU needs few launches, not a small cache
