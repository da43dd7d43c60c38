"""Host copies during a save: order of copies and waits."""

from contextlib import contextmanager
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from pretrain.checkpoint import host_copies
from pretrain.checkpoint.host_copies import HostCopies
from pretrain.checkpoint.tensor_file import Slice


class Recorded(torch.Tensor):
    """Tensor that claims to be on a GPU and records how it is copied."""

    calls: ClassVar[list[str]] = []

    @property
    def is_cuda(self):
        return True

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.Tensor.copy_:
            cls.calls.append(f"copy, non_blocking={kwargs['non_blocking']}")
        return super().__torch_function__(function, types, args, kwargs)


def test_gpu_copies_wait_for_mark_on_side_stream(monkeypatch):
    calls = Recorded.calls = []

    @contextmanager
    def stream(side):
        calls.append("on the side stream")
        yield
        calls.append("off the side stream")

    side = SimpleNamespace(
        device="cuda:0",
        wait_event=lambda event: calls.append("side stream waits for the mark"),
        synchronize=lambda: calls.append("the writer's thread waits for the side stream"),
    )
    event = SimpleNamespace(record=lambda stream: calls.append(f"mark on {stream}"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the training stream")
    memory = []
    monkeypatch.setattr(
        host_copies, "_host_memory", lambda like, pinned: memory.append(pinned) or torch.empty(like.shape)
    )
    copies = HostCopies(torch.device("cuda", 0))
    parts = [Slice("a", torch.ones(2).as_subclass(Recorded), (0,)), Slice("host", torch.ones(3), (0,))]
    for _ in range(2):
        calls.clear()
        copies.mark()
        with copies.reading():
            taken = copies.take(parts)
        assert calls == [
            "mark on the training stream",
            "side stream waits for the mark",
            "on the side stream",
            "copy, non_blocking=True",
            "the writer's thread waits for the side stream",
            "off the side stream",
        ]
        assert [part.tensor.tolist() for part in taken] == [[1.0, 1.0], [1.0, 1.0, 1.0]]
    assert memory == [True, False], "memory is reused by the next save"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_have_values_at_mark():
    weight = torch.zeros(1 << 24, device="cuda")
    copies = HostCopies(weight.device)
    weight.fill_(1.0)
    copies.mark()
    with copies.reading():
        (taken,) = copies.take([Slice("weight", weight, (0,))])
    weight.fill_(2.0)
    assert taken.tensor.is_pinned() and bool((taken.tensor == 1.0).all())
