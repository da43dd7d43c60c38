"""Counts the traffic and the memory of a step of launch/rehearsal.py."""

import gc
import weakref
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from launch.rehearsal import staged
from pretrain import precision
from pretrain.config.job import JobConfig
from pretrain.mesh import Mesh
from pretrain.vocab.kernels.base import Kernels
from pretrain.vocab.lookup import DistinctRows
from tests.ranks import context

aten = torch.ops.aten
KINDS = {
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "alltoall_base_": "all-to-all",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
}


@dataclass
class Simulated:
    """calls, given: per (axis, kind). lookup: rows that this rank sends for others' lookups, and receives for its own.
    held: peak bytes.
    """

    calls: Counter[tuple[str, str]]
    given: Counter[tuple[str, str]]
    lookup: tuple[int, int]
    held: int


def simulate(
    config: JobConfig, rows: int, parallel: int, world: int, kernels: Kernels, bf16: bool | None = None
) -> Simulated:
    """Runs rank 0's second step on `world` ranks, `parallel` of them per copy, in a separate process. All micro-batches
    have the same tokens. bf16: dtype of fake tensors is bf16; None: if this processor supports it.
    """
    with ProcessPoolExecutor(1, mp_context=context) as pool:  # DeepSpeed keeps groups beyond their end
        return pool.submit(_simulate, config, rows, parallel, world, kernels, bf16).result()


def _simulate(
    config: JobConfig, rows: int, parallel: int, world: int, kernels: Kernels, bf16: bool | None
) -> Simulated:
    if bf16 is not None:
        precision._computes_bf16 = lambda device_type: bf16  # type: ignore[assignment]
    held = Held()
    fake = not config.engine.reads_values
    with staged(config, rows, parallel, world, kernels, watching=held if fake else None) as stage:
        stage.step()  # in which DTensor and ZeRO-3 learn what comes
        gc.collect()
        held.most = held.now
        with Collectives(stage.mesh) as collectives:
            stage.step()
        plan, micro_batches = stage.plan, len(stage.batch.micro_batches)
        assert isinstance(plan, DistinctRows)
        lookup = micro_batches * sum(plan.send_counts[1:]), micro_batches * sum(plan.receive_counts[1:])
        return Simulated(collectives.calls, collectives.given, lookup, held.most)


class Collectives(TorchDispatchMode):
    """Counts the bytes that this rank passes to each; for an all-to-all, without its own part."""

    def __init__(self, mesh: Mesh) -> None:
        super().__init__()
        groups = {"dp": mesh.replica_group, "vocab": mesh.vocab_group, "world": mesh.flat.get_group()}
        self.axes = {group.group_name: axis for axis, group in groups.items()}  # of the whole world there is but one
        self.calls: Counter[tuple[str, str]] = Counter()
        self.given: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented
        if func.namespace == "c10d":
            self._count(KINDS[func._schema.name.removeprefix("c10d::")], args)
        return func(*args, **(kwargs or {}))

    def _count(self, kind: str, args: Any) -> None:
        group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
        mine = args[0] if isinstance(args[0], list) else [args[1]]
        given = sum(tensor.nbytes for tensor in mine)
        if kind == "all-to-all":
            own = args[4][group.rank()]
            given -= own * (given // len(args[1]))
        axis = self.axes.get(group.group_name, "world")  # DeepSpeed makes a group of its own of all ranks
        self.calls[axis, kind] += 1
        self.given[axis, kind] += given


class Held(TorchDispatchMode):
    """Counts the bytes of the tensors made while the context lasts: `now` alive, and `most` at once."""

    now = most = 0

    def __enter__(self) -> "Held":
        self.sizes: dict[int, int] = {}
        self._resize, held = torch.UntypedStorage.resize_, self

        def resize(storage: torch.UntypedStorage, size: int) -> None:
            self._resize(storage, size)
            held._see(storage)

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]  # FSDP2 lets weights go by it
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # what it does to its local tensors comes here, too
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            weakref.finalize(storage, self._forget, key)
        self._forget(key)
        self.sizes[key] = storage.nbytes()
        self.now += self.sizes[key]
        self.most = max(self.most, self.now)

    def _forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)
