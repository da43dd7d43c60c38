"""The ranks, their axes and their roles. Starts and stops the process group."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.tensor import Placement, Replicate, Shard

from .rendezvous import has_peers, in_its_words, meet
from .vocab.collectives import on_host

TIMEOUT = timedelta(minutes=10)
PATIENCE = timedelta(minutes=1)  # for ranks that may not exist: RANK can be left over, as in the pod of a training
RUN_ALONE_HINT = " (RANK and WORLD_SIZE are set in the environment: unset them to run alone)"


AXES = ("dp", "vocab")  # the ranks of the last axis are neighbours


@dataclass(frozen=True)
class Mesh:
    """The ranks, their axes, and the roles that a rank has in them.

    Ranks of one `vocab` group share one copy of the matrix; ranks of one `dp` group hold the same rows. Other modules
    ask for a role (`data_rank`, `replicas`, `matrix_placements`, ...) and not for an axis, so a new axis changes only
    this file. What is asked in every step is kept: slicing a DeviceMesh takes the host 0.1 ms.
    """

    axes: DeviceMesh  # a dim per axis
    flat: DeviceMesh  # the same ranks in one dim
    device: torch.device
    timeout: timedelta  # of a collective

    @classmethod
    def of(cls, vocab: int, device: torch.device, timeout: timedelta = TIMEOUT) -> "Mesh":
        """Builds the mesh over all ranks of the default group; `vocab` must divide their number."""
        world = dist.get_world_size()
        axes = init_device_mesh(device.type, (world // vocab, vocab), mesh_dim_names=AXES)
        flat = init_device_mesh(device.type, (world,), mesh_dim_names=("world",))
        for group in (*axes.get_all_groups(), *flat.get_all_groups()):
            _set_pg_timeout(timeout, group)  # otherwise NCCL's default, whatever the default group has
        return cls(axes, flat, device, timeout)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Number of ranks of each axis, by name."""
        return {axis: self.axes[axis].size() for axis in AXES}

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world(self) -> int:
        return self.flat.size()

    @property
    def data_rank(self) -> int:
        """Part of each global batch that this rank reads, in [0, data_world)."""
        return self.rank

    @property
    def data_world(self) -> int:
        """Number of parts of a global batch."""
        return self.world

    @property
    def vocab_group(self) -> dist.ProcessGroup:
        """The ranks that share one copy of the matrix."""
        return self.axes.get_group("vocab")

    @cached_property
    def vocab_rank(self) -> int:
        return self.axes.get_local_rank("vocab")

    @cached_property
    def vocab_size(self) -> int:
        """Number p of ranks of the vocab axis."""
        return self.axes["vocab"].size()

    @cached_property
    def replicas(self) -> int:
        """Number of copies of the matrix: ranks that hold the same rows as this one, itself included."""
        return self.axes["dp"].size()

    @property
    def replica_group(self) -> dist.ProcessGroup:
        """The ranks that hold the same rows as this one."""
        return self.axes.get_group("dp")

    @cached_property
    def first_replica(self) -> bool:
        """True on the ranks of the first copy, for sums in which each row counts once."""
        return self.axes.get_local_rank("dp") == 0

    def sum_replicas(self, tensors: Iterable[Tensor]) -> None:
        """Sums each tensor in place over the ranks with the same rows. One all-reduce per tensor, if replicated."""
        if self.replicas > 1:
            for tensor in tensors:
                dist.all_reduce(tensor, group=self.replica_group)

    @property
    def matrix_placements(self) -> tuple[Placement, ...]:
        """Placements of a DTensor on `axes` that is split like the matrix, by rows."""
        return tuple(Shard(0) if axis == "vocab" else Replicate() for axis in AXES)

    @property
    def copies(self) -> list[list[int]]:
        """The ranks of each copy of the matrix, in the order of their rows."""
        return self.axes.mesh.reshape(-1, self.vocab_size).tolist()

    def body(self, replicated: bool) -> tuple[DeviceMesh, int, int]:
        """Returns the mesh that an engine shards the body over, this rank's index there, and the number of shards.

        All ranks; if `replicated`, the ranks of one copy of the matrix: the body has as many copies (HSDP).
        """
        if replicated:
            return self.axes, self.vocab_rank, self.vocab_size
        return self.flat, self.rank, self.world


@contextmanager
def ranks(timeout: timedelta = TIMEOUT, patience: timedelta | None = None, remark: str = "") -> Iterator[torch.device]:
    """Starts the process group of this rank (nccl on GPUs, else gloo) and stops it at the end. Yields the device.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun sets them; without them this process
    is the only rank. timeout: of a collective. patience: to wait for all ranks; None: the timeout. Raises NotMet if a
    rank does not come, and on any error up to the first collective.
    """
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", _gpu_of(int(os.environ["LOCAL_RANK"])))
        torch.cuda.set_device(device)
    on_gpu = device.type == "cuda"
    with in_its_words():
        store, rank, world = meet(patience or timeout, remark)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store,
            rank=rank,
            world_size=world,
            timeout=timeout,
            device_id=device if on_gpu else None,
        )
        dist.barrier()
    yield device
    dist.destroy_process_group()  # not after an error: it would wait for ranks that wait for this one


def _gpu_of(local_rank: int) -> int:
    """Returns the index of this rank's GPU. Raises ValueError if it sees several GPUs, but fewer than ranks."""
    gpus = torch.cuda.device_count()
    if gpus == 1:
        return 0  # with Slurm's --gpus-per-task and --gpu-bind each task sees only its own GPU
    if local_rank >= gpus:
        raise ValueError(
            f"LOCAL_RANK={local_rank} must be below {gpus}, the GPUs that this rank sees: start one rank per GPU, and"
            " let each rank see either all GPUs of its node or its own alone (CUDA_VISIBLE_DEVICES, --gpu-bind)"
        )
    return local_rank


@contextmanager
def ranks_or_alone() -> Iterator[torch.device]:
    """Yields the device, for work that needs no ranks: starts `ranks` under torchrun, and else no process group."""
    if has_peers():
        with ranks(patience=PATIENCE, remark=RUN_ALONE_HINT) as device:
            yield device
    else:
        yield torch.device("cuda" if torch.cuda.is_available() else "cpu")


def ranks_of_a_node(device: torch.device) -> int:
    """Returns the smallest number of ranks per node, from LOCAL_WORLD_SIZE (unset: one node). One scalar all-reduce."""
    local_world = torch.full((), int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())), device=device)
    dist.all_reduce(local_world, dist.ReduceOp.MIN)
    return int(on_host(local_world))


def name_rank(device: torch.device) -> None:
    """Sets the environment from which DeepSpeed reads this rank's device."""
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index)  # differs from the given one if this rank sees only its own GPU
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("DS_ACCELERATOR", device.type)


def lost_peer(error: RuntimeError) -> bool:
    """True if a collective failed because another rank has ended. gloo reports that only in the text."""
    known = isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError)
    return known or "gloo" in str(error) or "Connection closed by peer" in str(error)


def device_error(error: RuntimeError) -> bool:
    """True if this rank's device has failed. NCCL reports that only in the text."""
    fatal = ("CUDA error", "unhandled cuda error", "Cuda failure", "device-side assert")
    return isinstance(error, torch.AcceleratorError) or any(text in str(error) for text in fatal)
