"""Peaks of GPUs by the makers' data sheets: FLOP/s of dense matmuls, without sparsity. Imports no torch."""

import re

PEAKS = {  # by the first of these that the GPU's name contains: in bf16, in fp32
    "GH200": (989e12, 67e12),
    "H200 NVL": (835e12, 60e12),
    "H200": (989e12, 67e12),
    "H100 NVL": (835e12, 60e12),
    "H100 PCIe": (756e12, 51e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "B200": (2250e12, 75e12),  # of HGX B200
    "L40S": (362e12, 91.6e12),
    "RTX 6000 Ada": (364.2e12, 91.1e12),  # as the next: with accumulation in fp32
    "RTX 4090": (165.2e12, 82.6e12),
}


def peak_of(name: str, itemsize: int) -> float | None:
    """Peak of a GPU with this name, as in "NVIDIA H100 80GB HBM3", with numbers of `itemsize` bytes; None if it is
    unknown or a slice of a GPU (MIG).
    """
    if re.search(r"\bMIG\b", name):
        return None
    for word, (bf16, fp32) in PEAKS.items():
        if re.search(rf"\b{word}\b", name):
            return {2: bf16, 4: fp32}.get(itemsize)
    return None
