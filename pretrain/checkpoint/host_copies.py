"""Copies of device tensors in host memory, made while training goes on.

Stands apart from the manager: it knows devices and streams, and no files or ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .tensor_file import Slice


class HostCopies:
    """The host's copy of each slice that this rank saves, kept from one save to the next.

    Copies of GPU tensors are in pinned memory, and are made on a stream of their own: neither the training stream nor
    its launches wait for them. torch rounds each pinned allocation up to a power of two.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ready: torch.cuda.Event | None = None
        self._copies: dict[str, Tensor] = {}

    def mark(self) -> None:
        """Call on the training thread: `reading` sees the tensors as the work launched so far leaves them."""
        if self._stream is not None:
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(self._stream.device))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Device work of the block runs behind `mark`, beside training, and has ended when the block is left."""
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
        """The slices with host copies in place of their tensors. Within `reading`; whole once it is left."""
        return [Slice(part.name, self._copy(part), part.offsets) for part in parts]

    def _copy(self, part: Slice) -> Tensor:
        on_gpu = part.tensor.is_cuda
        if part.name not in self._copies:
            self._copies[part.name] = _host_memory(part.tensor, pinned=on_gpu)
        return self._copies[part.name].copy_(part.tensor, non_blocking=on_gpu)


def _host_memory(like: Tensor, pinned: bool) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=pinned)
