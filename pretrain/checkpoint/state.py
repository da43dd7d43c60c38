"""State that a checkpoint saves: tensors, by names and shapes of the unsharded model, and a few numbers."""

import base64
import zlib
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..config.ema import AVERAGE
from ..engine import Engine
from ..mesh import Mesh
from ..optim import VocabOptimizer
from ..vocab import VocabParallelEmbedding, VocabShard
from ..vocab.collectives import on_host
from ..vocab.full_state import rows_dtensor
from ..vocab.shard import stable_seed
from .folder import CheckpointError
from .tensor_file import Slice


@dataclass
class TrainState:
    """Progress of the run."""

    step: int = 0  # optimizer steps done
    tokens: int = 0  # targets seen
    samples: dict[str, int] = field(default_factory=dict)  # samples consumed, by `Order.corpus`
    val_loss: float | None = None  # measured at this step; None: not measured
    left_out: list[list[int]] = field(default_factory=list)  # intervals of samples that the guard has left out
    rollbacks: int = 0  # of the guard, so far

    def become(self, other: "TrainState") -> None:
        """Takes the values of another state."""
        vars(self).update(vars(other))


HookState = Mapping[str, DTensor | float | list[float]]  # names begin with one of HOOK_PREFIXES
HOOK_PREFIXES = ("monitor.", f"{AVERAGE}.")  # of optional entries: the checkpoint or the resuming run may lack them


class Stateful(Protocol):
    """Object with a state that is saved beside the model, see `pretrain.hooks.Hook`."""

    def state_dict(self) -> HookState: ...
    def load_state_dict(self, state: HookState) -> None: ...


class HookStates:
    """States of all hooks at this moment. The constructor is collective: `state_dict` may have collectives."""

    def __init__(self, hooks: Iterable[Stateful]) -> None:
        self.states = [(hook, hook.state_dict()) for hook in hooks]
        self.all = {name: value for _, state in self.states for name, value in state.items()}
        assert all(name.startswith(HOOK_PREFIXES) for name in self.all), f"{list(self.all)}: see Hook.state_dict"

    @property
    def tensors(self) -> dict[str, DTensor]:
        return {name: value for name, value in self.all.items() if isinstance(value, DTensor)}

    @property
    def numbers(self) -> dict[str, float | list[float]]:
        """Numbers and lists of numbers for the manifest's entry "hooks"."""
        return {name: value for name, value in self.all.items() if not isinstance(value, DTensor)}

    def load(self, manifest: Mapping[str, Any]) -> None:
        """Restores each hook from the manifest and the tensors, which must be filled."""
        numbers = manifest.get("hooks", {})
        saved = manifest["tensors"].keys() | numbers.keys()
        for hook, state in self.states:
            found = {name: numbers.get(name, value) for name, value in state.items() if name in saved}
            if found:
                hook.load_state_dict(found)


class ModelState:
    """Tensors of a run as DTensors: fp32 parameters and optimizer states of body and matrix."""

    def __init__(
        self, engine: Engine, vocab: VocabParallelEmbedding, vocab_optimizer: VocabOptimizer, mesh: Mesh
    ) -> None:
        self.engine, self.vocab, self.vocab_optimizer, self.mesh = engine, vocab, vocab_optimizer, mesh

    def match(self, saved: Container[str]) -> None:
        """Unties the matrix if the checkpoint has two. Call it before `tensors`. saved: names in the checkpoint."""
        head = self.vocab.match(saved)
        if head is not None:
            self.vocab_optimizer.add_copy(head, self.vocab.weight)

    def tensors(self) -> dict[str, DTensor]:
        """Returns the tensors, to be saved, or to be filled in place and passed to `load`."""
        state = self.engine.state()
        for name, rows in self.vocab.named_rows().items():
            for saved, tensor_vD in self.vocab_optimizer.optimizer.tensors(name, rows).items():
                state[saved] = matrix_dtensor(tensor_vD, self.vocab.shard, self.mesh)
        return state

    def load(self, tensors: dict[str, DTensor], step: int) -> None:
        self.engine.load(tensors, step)
        self.vocab_optimizer.optimizer.load(step)

    def digests(self) -> dict[str, tuple[int, int] | None]:
        """Digests of this rank's rows per matrix; None if it has only padding rows, which are equal on all ranks."""
        owns = self.vocab.shard.valid_rows > 0
        return {name: digest(rows.detach()) if owns else None for name, rows in self.vocab.named_rows().items()}


def check_shards(digests: list[dict[str, tuple[int, int] | None]], mesh: Mesh) -> None:
    """Raises CheckpointError, with the ranks, if two shards are equal or two replicas differ. digests: per rank.

    A shard is a plain tensor. A library that takes it for a replica overwrites it silently; for example, plain
    DeepSpeed broadcasts the shard of rank 0 to all ranks.
    """
    for name in digests[0]:
        for group in mesh.copies:
            seen: dict[tuple[int, int], int] = {}
            for rank in group:
                mine = digests[rank][name]
                if mine is None:
                    continue
                if mine in seen:
                    raise CheckpointError(
                        f"{name}: ranks {seen[mine]} and {rank} own different rows, but hold the same values:"
                        " one rank's shard was copied over the other's"
                    )
                seen[mine] = rank
        for first, *others in zip(*mesh.copies, strict=True):
            for rank in others:
                if digests[rank][name] != digests[first][name]:
                    raise CheckpointError(
                        f"{name}: ranks {first} and {rank} hold the same rows, but with different values:"
                        " the replicas have drifted apart"
                    )


def digest(rows_vD: Tensor) -> tuple[int, int]:
    """Returns two sums over the bits, one weighted by row. Exact, so the order does not matter. Memory: v numbers."""
    words = rows_vD.view(torch.int64) if rows_vD.shape[1] % 2 == 0 else rows_vD.view(torch.int32)
    sums_v = words.sum(dim=1, dtype=torch.int64)  # for int32, torch would first make a copy of twice the size
    by_row_v = sums_v * torch.arange(1, len(sums_v) + 1, device=sums_v.device)
    plain, by_row = on_host(torch.stack([sums_v.sum(), by_row_v.sum()])).tolist()
    return plain, by_row


def slices(tensors: dict[str, DTensor]) -> Iterator[Slice]:
    """Yields the slices that this rank saves: its part of each tensor, unless empty or saved by another replica.

    Replicas take turns: tensor i is saved by replica i modulo the number of replicas.
    """
    for i, (name, tensor) in enumerate(tensors.items()):
        coordinate = tensor.device_mesh.get_coordinate()
        assert coordinate is not None, f"{name} is on a mesh without this rank"
        replica = [
            (place, tensor.device_mesh.size(dim))
            for dim, place in enumerate(coordinate)
            if tensor.placements[dim].is_replicate()
        ]
        part = tensor.to_local()
        if part.numel() and all(place == i % size for place, size in replica):
            (chunk,) = tensor.__create_chunk_list__()
            yield Slice(name, part, tuple(chunk.offsets))


def matrix_dtensor(rows_vD: Tensor, shard: VocabShard, mesh: Mesh) -> DTensor:
    """Wraps this rank's rows as a DTensor [padded_size, D], sharded by rows and replicated over `dp`."""
    return rows_dtensor(rows_vD, shard, mesh.axes, mesh.matrix_placements)


def shapes(tensors: dict[str, DTensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in sorted(tensors.items())}


def rng_state() -> dict[str, str]:
    """States of this rank's random generators, as text."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: base64.b64encode(zlib.compress(bytes(state.numpy()))).decode() for name, state in states.items()}


def restore_rng(per_rank: list[dict[str, str]], mesh: Mesh, seed: int, step: int) -> None:
    """Restores this rank's random generators; seeds them by (seed, step, rank) if the number of ranks has changed."""
    if len(per_rank) != mesh.world:
        torch.manual_seed(stable_seed(seed, "rng", step, mesh.rank))
        return
    setters: dict[str, Any] = {"cpu": torch.set_rng_state, "cuda": torch.cuda.set_rng_state}
    for name, text in per_rank[mesh.rank].items():
        if name == "cpu" or torch.cuda.is_available():
            setters[name](torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(text))), dtype=torch.uint8))
