"""Copies of device tensors in host memory, made while training continues.

Separate from the manager: it handles devices and streams, not files or ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .tensor_file import Slice


class HostCopies:
    """Host copies of the slices that this rank saves. The memory is reused for the next save.

    GPU tensors are copied to pinned memory on a separate stream: the training stream does not wait for the copies.
    torch rounds each pinned allocation up to a power of two.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ready: torch.cuda.Event | None = None
        self._copies: dict[str, Tensor] = {}

    def mark(self) -> None:
        """Marks the moment to copy: after all work launched so far. Call it on the training thread."""
        if self._stream is not None:
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(self._stream.device))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Runs device work inside the block after `mark` and parallel to training. It ends with the block."""
        if self._stream is None or self._ready is None:
            yield
            return
        self._stream.wait_event(self._ready)
        with torch.cuda.stream(self._stream):
            try:
                yield
            finally:
                self._stream.synchronize()

    def take(self, parts: list[Slice]) -> list[Slice]:
        """Returns the slices with host copies as tensors. Call it inside `reading`; the copies are valid after it."""
        return [Slice(part.name, self._copy(part), part.offsets) for part in parts]

    def _copy(self, part: Slice) -> Tensor:
        on_gpu = part.tensor.is_cuda
        if part.name not in self._copies:
            self._copies[part.name] = _host_memory(part.tensor, pinned=on_gpu)
        return self._copies[part.name].copy_(part.tensor, non_blocking=on_gpu)


def _host_memory(like: Tensor, pinned: bool) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=pinned)
