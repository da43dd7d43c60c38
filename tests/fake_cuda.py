"""Fake GPUs: code for CUDA and NCCL runs without a GPU, on torch's fake tensors and its fake process group.

Fake tensors have a device, a dtype and a shape, but no values; torch raises an error if an operation mixes devices.
Separate from launch/rehearsal.py, which a user runs before a training: it never changes torch.
"""

import atexit
import contextlib
import ctypes
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import fake_tensor

CUDA = torch.device("cuda", 0)
HOST_GROUPS: set[str] = set()  # names of the groups that would be gloo's


class Event:
    """An event that has happened already."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> "Event":
        return self

    def wait(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...


class Stream:
    """A stream without work."""

    device = CUDA

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait_stream(self, stream: "Stream") -> None: ...
    def wait_event(self, event: Event) -> None: ...
    def record_event(self, *args: Any) -> Event:
        return Event()

    def synchronize(self) -> None: ...


@contextlib.contextmanager
def fake_gpus(count: int) -> Iterator[None]:
    """Replaces torch.cuda by `count` fake GPUs; this process uses the first. Use it in a process of its own:
    `pretend_cuda_is_built` cannot be undone.
    """
    if not torch.backends.cuda.is_built():
        pretend_cuda_is_built()
    replaced: dict[str, Any] = {
        "device_count": lambda: count,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *args, **kwargs: True,
        "_lazy_init": lambda: None,
        "set_device": lambda device: None,
        "current_device": lambda: 0,
        "current_stream": lambda device=None: Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "max_memory_allocated": lambda device=None: 2**30,
        "Stream": Stream,
        "Event": Event,
    }
    new_group = dist.new_group

    def fake_group(*args: Any, backend: str = "fake", **kwargs: Any) -> Any:
        group = new_group(*args, backend="fake", **kwargs)
        if backend == "gloo":
            HOST_GROUPS.add(group.group_name)
        return group

    with contextlib.ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch, "Event", Event))
        stack.enter_context(mock.patch.object(dist, "new_group", fake_group))
        stack.enter_context(mock.patch.object(Tensor, "record_stream", lambda tensor, stream: None))
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context", lambda device: None))
        # torch.tensor(..., device="cuda") makes a tensor in host memory and copies it, as with a real GPU
        stack.enter_context(mock.patch.object(fake_tensor.FakeTensorMode, "avoid_device_init", True))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        yield


def pretend_cuda_is_built() -> None:
    """Makes a torch without CUDA run autograd on fake tensors of CUDA. It cannot be undone.

    Autograd, written in C++, asks for the device's guard, and whether CUDA was built. torch has a guard that does
    nothing, and sets it if the present guard counts no devices; so a guard that answers 0 to every call comes first.
    CUDA's hooks get a table of methods that answer 0 as well. One answers yes: the one that makes CUDA the accelerator.
    """
    libraries = Path(torch.__file__).parent / "lib"
    c10, aten = (ctypes.CDLL(str(libraries / name)) for name in ("libc10.so", "libtorch_cpu.so"))
    method = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)
    no, yes = method(lambda self: 0), method(lambda self: 1)
    size = 128  # more than the methods of any of the two
    address = ctypes.cast(no, ctypes.c_void_p).value
    nothing = (ctypes.c_void_p * size)(*[address] * size)
    guard = ctypes.c_void_p(ctypes.addressof(nothing))
    register = c10._ZN3c104impl19registerDeviceGuardENS_10DeviceTypeEPKNS0_24DeviceGuardImplInterfaceE
    register(ctypes.c_int8(1), ctypes.byref(guard))  # 1: CUDA
    torch._C._ensureCUDADeviceGuardSet()
    hooks_of = aten._ZN2at6detail12getCUDAHooksEv
    hooks_of.restype = ctypes.c_void_p
    hooks = ctypes.c_void_p.from_address(hooks_of())
    atexit.register(setattr, hooks, "value", hooks.value)  # at its end the process destroys the hooks
    for place in range(2, size):  # after the two destructors
        methods = (ctypes.c_void_p * size)(*[address] * size)
        methods[place] = ctypes.cast(yes, ctypes.c_void_p).value
        hooks.value = ctypes.addressof(methods)
        if torch.accelerator.current_accelerator() is not None:
            _KEPT.extend([no, yes, nothing, guard, methods])
            return
    raise RuntimeError(f"torch {torch.__version__} does not ask CUDA's hooks for the accelerator")


_KEPT: list[Any] = []  # memory that torch now uses


@contextlib.contextmanager
def launches_counted() -> Iterator[Counter[str]]:
    """Counts the launches of Triton's kernels instead of launching them. Checks that their tensors are on the GPU."""
    from triton.runtime.jit import KernelInterface

    launched: Counter[str] = Counter()

    def launch(kernel: Any, grid: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> None:
            name = kernel.fn.__name__
            launched[name] += 1
            assert all(arg.is_cuda for arg in args if isinstance(arg, Tensor)), f"{name} gets a tensor in host memory"

        return run

    with mock.patch.object(KernelInterface, "__getitem__", launch):
        yield launched
