"""The dtype that matmuls run in. Apart from config/training.py because it needs torch and the device."""

import torch

from .config.training import TrainingConfig


def compute_dtype(train: TrainingConfig, device_type: str, bf16: bool | None = None) -> torch.dtype:
    """Dtype of matmuls. Raises ValueError if bf16 is asked of a processor that only emulates it.

    bf16: whether the device computes it natively; None: this machine's is asked.
    """
    native = bf16 if bf16 is not None else _computes_bf16(device_type)
    if train.precision == "bf16" and not native:
        raise ValueError(f"train.precision=bf16: this {device_type} does not compute it natively; use fp32 or auto")
    return torch.bfloat16 if native and train.precision != "fp32" else torch.float32


def _computes_bf16(device_type: str) -> bool:
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(key) for key in ("avx512_bf16", "amx_bf16", "bf16"))
