"""Dtype of matmuls. Not part of config/training.py, because it needs torch and the device."""

import torch

from .config.training import TrainingConfig


def compute_dtype(train: TrainingConfig, device_type: str, bf16: bool | None = None) -> torch.dtype:
    """Returns the dtype of matmuls. Raises ValueError if bf16 is requested and the processor only emulates it.

    bf16: native support of the device; None: this machine's device is queried.
    """
    native = bf16 if bf16 is not None else _computes_bf16(device_type)
    if train.precision == "bf16" and not native:
        raise ValueError(f"train.precision=bf16: this {device_type} has no native bf16; use fp32 or auto")
    return torch.bfloat16 if native and train.precision != "fp32" else torch.float32


def _computes_bf16(device_type: str) -> bool:
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(key) for key in ("avx512_bf16", "amx_bf16", "bf16"))
