"""Counts where the host waits for a GPU, on fake tensors (`tests/fake_cuda.py`), and answers what the host reads."""

import sys
from collections import Counter
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from .fake_cuda import HOST_GROUPS

aten = torch.ops.aten
READS = {  # the host waits for the result, or for its size
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.equal.default,
    aten._linalg_eigh.default,  # reads cuSOLVER's error code
}
OTHER = 2  # answer to a read of an unknown number


class HostWaits(TorchDispatchMode):
    """Enter it after all other modes.

    waits: (function, what) → count. The function is the innermost of pretrain, or the caller of `on_host`. faults:
    collectives of host tensors in a group of GPUs, and the reverse.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.faults: list[str] = []
        self.known = WeakTensorKeyDictionary()  # numbers from torch.full and torch.tensor; all ranks have the same
        self.pinned = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        collective = func.namespace in ("c10d", "_c10d_functional")
        if collective:
            self._check_group(func, args, tensors)
        what = self._wait(func, args, kwargs, tensors)
        if what is not None:
            self.waits[place(), what] += 1
        answer = self._answer(func, args)
        out = func(*args, **kwargs) if answer is None else answer
        if func is aten.full.default:
            self.known[out] = args[1]
        elif func is aten.lift_fresh.default and out.numel() == 1 and out.constant is not None:
            with unset_fake_temporarily():
                self.known[out] = out.constant.item()
        elif func is aten._to_copy.default and args[0] in self.known:
            self.known[out] = self.known[args[0]]
        elif func._schema.is_mutable and not collective:
            for tensor in tensors[:1]:
                self.known.pop(tensor, None)
        if kwargs.get("pin_memory") or func is aten._pin_memory.default:
            self.pinned[out] = True
        return out

    def _check_group(self, func: Any, args: Any, tensors: list[Tensor]) -> None:
        """Records a fault if a tensor is not where the group's backend needs it."""
        groups = [arg for arg in args if isinstance(arg, torch.ScriptObject)]
        names = [name for name in map(_group_name, groups) if name is not None]
        on_host = any(name in HOST_GROUPS for name in names)
        if any(tensor.is_cuda == on_host for tensor in tensors):
            self.faults.append(f"{place()}: {func} in a group of {'hosts' if on_host else 'GPUs'}")

    def _wait(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> str | None:
        if func is aten._to_copy.default and kwargs.get("device") is not None:
            return self._copy(args[0], kwargs["device"], None, kwargs.get("non_blocking", False))
        if func is aten.copy_.default:
            return self._copy(args[1], args[0].device, args[0], kwargs.get("non_blocking", len(args) > 2 and args[2]))
        if not any(tensor.is_cuda for tensor in tensors):
            return None
        if func is aten.index.Tensor and any(map(_is_mask, args[1])):
            return "index by mask"
        return func.overloadpacket.__name__ if func in READS else None

    def _copy(self, source: Tensor, device: torch.device, target: Tensor | None, non_blocking: bool) -> str | None:
        """Returns what a copy is if the host waits for it. torch pins the memory of a new copy that is non-blocking."""
        if source.device.type == device.type:
            return None
        at_host = source if device.type == "cuda" else target
        if non_blocking and (at_host is None or at_host in self.pinned):
            return None
        return "copy to the host" if source.is_cuda else "copy to the device"

    def _answer(self, func: Any, args: Any) -> Any:
        """Returns a result if it depends on values: a mask selects one entry per row, and ids are all different."""
        tensor = args[0] if args else None
        if not isinstance(tensor, FakeTensor):
            return None
        if func is aten._local_scalar_dense.default:
            return tensor.dtype is torch.bool or self.known.get(tensor, OTHER)
        if func is aten.nonzero.default:
            return tensor.new_empty(len(tensor), tensor.dim(), dtype=torch.int64)
        if func is aten.index.Tensor and any(map(_is_mask, args[1])):
            return torch.empty_like(tensor)
        if func is aten._unique2.default:
            places = torch.empty_like(tensor, dtype=torch.int64)
            return torch.empty_like(tensor), places, places
        if func is aten._pin_memory.default:
            return torch.empty_like(tensor)
        return None


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype is torch.bool


def _group_name(argument: torch.ScriptObject) -> str | None:
    try:
        return dist.ProcessGroup.unbox(argument).group_name
    except RuntimeError:  # a reduce operation
        return None


def place() -> str:
    """Returns the name of the innermost function of pretrain that runs; for `on_host`, of its caller."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if "/pretrain/" in code.co_filename and "/tests/" not in code.co_filename and code.co_name != "on_host":
            return code.co_qualname.split(".<locals>")[0]
        frame = frame.f_back
    return "outside of pretrain"
