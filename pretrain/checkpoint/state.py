"""State that must survive: tensors by the names and shapes of the unsharded model, and the few numbers beside them."""

import base64
import zlib
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

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
    """The progress of the run. step: optimizer steps done; samples: consumed of each corpus; tokens: targets seen.

    val_loss: as measured at this very step, None where it was not.
    """

    step: int = 0
    tokens: int = 0
    samples: dict[str, int] = field(default_factory=dict)
    val_loss: float | None = None


HookState = Mapping[str, DTensor | float]  # by names that begin with HOOK_PREFIX
HOOK_PREFIX = "monitor."  # of what may be missing, in a checkpoint or in the run that resumes it


class Stateful(Protocol):
    """Has something that must survive besides the model: see `pretrain.hooks.Hook`."""

    def state_dict(self) -> HookState: ...
    def load_state_dict(self, state: HookState) -> None: ...


class HookStates:
    """The state of each hook, as it is at this moment. Made on all ranks together: it may have collectives."""

    def __init__(self, hooks: Iterable[Stateful]) -> None:
        self.states = [(hook, hook.state_dict()) for hook in hooks]
        self.all = {name: value for _, state in self.states for name, value in state.items()}
        assert all(name.startswith(HOOK_PREFIX) for name in self.all), f"{list(self.all)}: see Hook.state_dict"

    @property
    def tensors(self) -> dict[str, DTensor]:
        return {name: value for name, value in self.all.items() if isinstance(value, DTensor)}

    @property
    def numbers(self) -> dict[str, float]:
        """Numbers that go into a manifest: under "hooks", if there are any."""
        return {name: value for name, value in self.all.items() if not isinstance(value, DTensor)}

    def load(self, manifest: Mapping[str, Any]) -> None:
        """Hands each hook what a checkpoint with this manifest has of its state; its tensors are filled."""
        numbers = manifest.get("hooks", {})
        saved = manifest["tensors"].keys() | numbers.keys()
        for hook, state in self.states:
            found = {name: numbers.get(name, value) for name, value in state.items() if name in saved}
            if found:
                hook.load_state_dict(found)


class ModelState:
    """All tensors of a run, body and matrix, parameters (fp32) and optimizer states, as DTensors."""

    def __init__(
        self, engine: Engine, vocab: VocabParallelEmbedding, vocab_optimizer: VocabOptimizer, mesh: Mesh
    ) -> None:
        self.engine, self.vocab, self.vocab_optimizer, self.mesh = engine, vocab, vocab_optimizer, mesh

    def match(self, saved: Container[str]) -> None:
        """Before `tensors`: as many matrices as there are in a checkpoint whose tensors have the names `saved`."""
        head = self.vocab.match(saved)
        if head is not None:
            self.vocab_optimizer.add_copy(head, self.vocab.weight)

    def tensors(self) -> dict[str, DTensor]:
        """To be written, or to be filled in place and handed to `load`."""
        state = self.engine.state()
        for name, rows in self.vocab.named_rows().items():
            for saved, tensor_vD in self.vocab_optimizer.optimizer.tensors(name, rows).items():
                state[saved] = matrix_dtensor(tensor_vD, self.vocab.shard, self.mesh)
        return state

    def load(self, tensors: dict[str, DTensor], step: int) -> None:
        self.engine.load(tensors, step)
        self.vocab_optimizer.optimizer.load(step)

    def digests(self) -> dict[str, tuple[int, int] | None]:
        """Digests of this rank's rows of each matrix; None where it has none but padding, which all look alike."""
        owns = self.vocab.shard.valid_rows > 0
        return {name: digest(rows.detach()) if owns else None for name, rows in self.vocab.named_rows().items()}


def check_shards(digests: list[dict[str, tuple[int, int] | None]], mesh: Mesh) -> None:
    """CheckpointError, naming the ranks, unless shards differ and replicas are equal. `digests`: of each rank.

    A shard is a plain tensor, so whatever takes it for a replica overwrites it without a word: plain DeepSpeed
    broadcasts rank 0's over the others.
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
                        " something has copied one rank's shard over the other's"
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
    """Two sums over the bits, one of them by row: exact, so that their order does not matter. One pass, v numbers."""
    words = rows_vD.view(torch.int64) if rows_vD.shape[1] % 2 == 0 else rows_vD.view(torch.int32)
    sums_v = words.sum(dim=1, dtype=torch.int64)  # of int32, torch would first make a copy of twice the size
    by_row_v = sums_v * torch.arange(1, len(sums_v) + 1, device=sums_v.device)
    plain, by_row = on_host(torch.stack([sums_v.sum(), by_row_v.sum()])).tolist()
    return plain, by_row


def slices(tensors: dict[str, DTensor]) -> Iterator[Slice]:
    """Yields what this rank saves of them: its part, unless it is empty or a replica that another rank saves.

    The replicas of one tensor after the other fall to one rank after the other.
    """
    for i, (name, tensor) in enumerate(tensors.items()):
        coordinate = tensor.device_mesh.get_coordinate()
        assert coordinate is not None, f"{name} lies on a mesh that this rank is not part of"
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
    """A rank's rows as its part of the matrix [padded_size, D], split by rows, replicated where the mesh says so."""
    return rows_dtensor(rows_vD, shard, mesh.axes, mesh.matrix_placements)


def shapes(tensors: dict[str, DTensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in sorted(tensors.items())}


def rng_state() -> dict[str, str]:
    """This rank's generators, as text."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {name: base64.b64encode(zlib.compress(bytes(state.numpy()))).decode() for name, state in states.items()}


def restore_rng(per_rank: list[dict[str, str]], mesh: Mesh, seed: int, step: int) -> None:
    """This rank's generators as saved; in another world they are seeded anew by (seed, step, rank)."""
    if len(per_rank) != mesh.world:
        torch.manual_seed(stable_seed(seed, "rng", step, mesh.rank))
        return
    setters: dict[str, Any] = {"cpu": torch.set_rng_state, "cuda": torch.cuda.set_rng_state}
    for name, text in per_rank[mesh.rank].items():
        if name == "cpu" or torch.cuda.is_available():
            setters[name](torch.frombuffer(bytearray(zlib.decompress(base64.b64decode(text))), dtype=torch.uint8))
