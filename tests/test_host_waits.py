"""`HostWaits` finds what makes the host wait for a GPU, and tensors that are not where their group needs them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.fake_cuda import CUDA, fake_gpus
from tests.host_waits import HostWaits
from tests.ranks import run_alone

WAITS: dict[str, tuple[Callable[[Tensor], Any], list[str]]] = {
    "a number": (lambda x: float(x.sum()), ["_local_scalar_dense"]),
    "a condition": (lambda x: bool((x > 0).all()), ["_local_scalar_dense"]),
    "nonzero": (lambda x: (x > 0).nonzero(), ["nonzero"]),
    "a mask as an index": (lambda x: x[x > 0], ["index by mask"]),
    "indices of the device": (lambda x: x[x.long()], []),
    "a list of indices": (lambda x: x[[2, 0]], ["copy to the device"]),
    "a number to the device": (lambda x: torch.tensor(3, device=CUDA), ["copy to the device"]),
    "a number made there": (lambda x: torch.full((), 3, device=CUDA), []),
    "to the host": (lambda x: x.cpu(), ["copy to the host"]),
    "to pinned memory": (lambda x: torch.empty(4, pin_memory=True).copy_(x, non_blocking=True), []),
    "to pageable memory": (lambda x: torch.empty(4).copy_(x, non_blocking=True), ["copy to the host"]),
    "from pinned memory": (lambda x: torch.ones(4).pin_memory().to(CUDA, non_blocking=True), []),
    "from pinned memory, blocking": (lambda x: torch.ones(4).pin_memory().to(CUDA), ["copy to the device"]),
    "from pageable memory": (lambda x: torch.ones(4).to(CUDA, non_blocking=True), ["copy to the device"]),
    "arithmetic": (lambda x: (x @ x).relu().mean(), []),
}


def found() -> tuple[dict[str, list[str]], list[int]]:
    """Returns the waits of each case, and how many faults four collectives have: two are where they should be."""
    with fake_gpus(2):
        dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
        hosts = dist.new_group(backend="gloo")
        waits, faults = {}, []
        for name, (action, _) in WAITS.items():
            with FakeTensorMode(), HostWaits() as watch:
                action(torch.ones(4, device=CUDA))
                waits[name] = [what for _, what in watch.waits.elements()]
        for device in (CUDA, torch.device("cpu")):
            for group in (dist.group.WORLD, hosts):
                with FakeTensorMode(), HostWaits() as watch:
                    dist.all_reduce(torch.ones(4, device=device), group=group)
                    faults.append(len(watch.faults))
        return waits, faults


def test_waits_and_misplaced_tensors_are_found():
    waits, faults = run_alone(found, timeout=120)
    assert waits == {name: expected for name, (_, expected) in WAITS.items()}
    assert faults == [0, 1, 1, 0]
