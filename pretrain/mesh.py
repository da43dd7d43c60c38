"""The ranks and their two axes, `dp` × `vocab`. Starts and stops the process group."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from .rendezvous import has_peers, in_its_words, meet
from .vocab.collectives import on_host

TIMEOUT = timedelta(minutes=10)
PATIENCE = timedelta(minutes=1)  # for ranks that may be none: RANK can be left over, as in a pod of a training
RUN_ALONE_HINT = " (RANK and WORLD_SIZE are set in the environment: unset them to run alone)"


@dataclass(frozen=True)
class Mesh:
    """world = dp × vocab ranks, each with tokens of its own.

    Ranks of one `vocab` group are neighbours and share one copy of the matrix; ranks of one `dp` group hold
    the same rows. `axes` is the 2-d mesh (dp, vocab), `flat` the same ranks in one dim: what the engine
    shards the body over.
    """

    axes: DeviceMesh
    flat: DeviceMesh
    device: torch.device
    timeout: timedelta

    @classmethod
    def of(cls, vocab: int, device: torch.device, timeout: timedelta = TIMEOUT) -> "Mesh":
        """The mesh over all ranks of the default group, whose number `vocab` divides. timeout: of a collective."""
        world = dist.get_world_size()
        axes = init_device_mesh(device.type, (world // vocab, vocab), mesh_dim_names=("dp", "vocab"))
        flat = init_device_mesh(device.type, (world,), mesh_dim_names=("world",))
        for group in (*axes.get_all_groups(), *flat.get_all_groups()):
            _set_pg_timeout(timeout, group)  # else NCCL's own, whatever that of the default group is
        return cls(axes, flat, device, timeout)

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def world(self) -> int:
        return self.flat.size()

    @property
    def vocab_group(self) -> dist.ProcessGroup:
        return self.axes.get_group("vocab")

    @property
    def dp_group(self) -> dist.ProcessGroup:
        return self.axes.get_group("dp")

    @property
    def vocab_rank(self) -> int:
        return self.axes.get_local_rank("vocab")

    @property
    def dp_rank(self) -> int:
        return self.axes.get_local_rank("dp")

    @property
    def vocab_size(self) -> int:
        """p: ranks of the vocab axis."""
        return self.axes["vocab"].size()

    @property
    def dp_size(self) -> int:
        return self.axes["dp"].size()


@contextmanager
def ranks(timeout: timedelta = TIMEOUT, patience: timedelta | None = None, remark: str = "") -> Iterator[torch.device]:
    """Starts the process group of this rank (nccl where there are GPUs, else gloo) and stops it at the end.

    Reads RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun sets them; without them this
    process is a world of one. Yields the rank's device. timeout: of a collective; patience: for all ranks to come, the
    same if None. Raises NotMet if a rank does not come, or until the first collective has succeeded.
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
    """Index of this rank's GPU among those it sees. ValueError if there are several, but fewer than ranks."""
    gpus = torch.cuda.device_count()
    if gpus == 1:
        return 0  # Slurm's --gpus-per-task and --gpu-bind show each task its own GPU alone
    if local_rank >= gpus:
        raise ValueError(
            f"LOCAL_RANK={local_rank} must be below {gpus}, the GPUs that this rank sees: start one rank per GPU, and"
            " let each rank see either all GPUs of its node or its own alone (CUDA_VISIBLE_DEVICES, --gpu-bind)"
        )
    return local_rank


@contextmanager
def ranks_or_alone() -> Iterator[torch.device]:
    """For what needs no ranks: those that torchrun has started, see `ranks`, or this process without a group."""
    if has_peers():
        with ranks(patience=PATIENCE, remark=RUN_ALONE_HINT) as device:
            yield device
    else:
        yield torch.device("cuda" if torch.cuda.is_available() else "cpu")


def ranks_of_a_node(device: torch.device) -> int:
    """Ranks on the node that has fewest, from LOCAL_WORLD_SIZE (unset: all are on one). One all-reduce of a number."""
    here = torch.full((), int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())), device=device)
    dist.all_reduce(here, dist.ReduceOp.MIN)
    return int(on_host(here))


def name_rank(device: torch.device) -> None:
    """For DeepSpeed, which learns a rank's device from the environment alone."""
    if device.type == "cuda":
        os.environ["LOCAL_RANK"] = str(device.index)  # which differs if this rank sees its own GPU alone
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("DS_ACCELERATOR", device.type)


def lost_peer(error: RuntimeError) -> bool:
    """Whether a collective failed because another rank is gone; gloo says so in the text alone."""
    known = isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError)
    return known or "gloo" in str(error) or "Connection closed by peer" in str(error)


def device_error(error: RuntimeError) -> bool:
    """Whether this rank's own device has failed; NCCL says so in the text alone."""
    fatal = ("CUDA error", "unhandled cuda error", "Cuda failure", "device-side assert")
    return isinstance(error, torch.AcceleratorError) or any(text in str(error) for text in fatal)
