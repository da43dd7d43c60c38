"""Batches for this rank, made ready by a thread while the step before runs."""

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..vocab import VocabShard
from ..vocab.lookup import LookupPlan, plan_lookup
from .dataset import IGNORED, Window, Windows
from .samples import Samples


@dataclass(frozen=True)
class MicroBatch:
    """tokens, targets: [B, T] int64 on the rank's device; a target is IGNORED where there is none.

    starts_BT: where in its sequence the document of each token begins; None: they are not told apart.
    plan: who sends which rows for the lookup of the tokens; None leaves it to the lookup.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    starts_BT: Tensor | None = None
    plan: LookupPlan | None = None

    def moved(self, move: Callable[[Tensor], Tensor], plan: LookupPlan | None = None) -> "MicroBatch":
        """Its tensors elsewhere."""
        starts_BT = None if self.starts_BT is None else move(self.starts_BT)
        return MicroBatch(move(self.tokens_BT), move(self.targets_BT), starts_BT, plan)


@dataclass(frozen=True)
class Batch:
    """This rank's part of one global batch; n_targets counts its valid targets."""

    micro_batches: list[MicroBatch]
    n_targets: int


class BatchLoader:
    """Serves samples consumed, consumed + 1, ... of the run, `global_batch` a step over all ranks.

    It reads the tokens of all ranks that share the matrix (`shard.world` neighbours), and so plans this rank's part of
    their lookup, of rows in `dtype`, without a word between them.

    Its whole state is how many samples of each corpus were handed out, so it continues at any world size,
    micro-batch and global batch. Raises ValueError on a token id that is no row of the vocabulary.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world: int,
        shard: VocabShard,
        dtype: torch.dtype,
        device: torch.device,
        prefetch: int,
    ) -> None:
        self.samples, self.device, self.prefetch = samples, device, prefetch
        self.global_batch, self.micro_batch, self.rank, self.world = global_batch, micro_batch, rank, world
        self.shard, self.dtype = shard, dtype
        self.consumed: dict[str, int] = {}
        self._ready: queue.Queue[Batch | Exception] | None = None
        self._stop = threading.Event()

    def state_dict(self) -> dict[str, int]:
        return dict(self.consumed)

    def load_state_dict(self, state: dict[str, int]) -> None:
        assert self._ready is None, "the position must be set before the first batch"
        self.consumed = dict(state)

    def epochs(self) -> dict[str, float]:
        """How often each corpus has been gone through, by its title."""
        return self.samples.epochs(self.consumed)

    def __next__(self) -> Batch:
        if self._ready is None:
            self._ready = queue.Queue(self.prefetch)
            self._thread = threading.Thread(target=self._fill, args=(self.consumed,), daemon=True, name="loader")
            self._thread.start()
        batch = self._ready.get()
        if isinstance(batch, Exception):
            raise batch
        self.consumed = self.samples.after(self.consumed, self.global_batch)
        return Batch([self._to_device(micro) for micro in batch.micro_batches], batch.n_targets)

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        while self._ready is not None and self._thread.is_alive():
            try:
                self._ready.get(timeout=0.05)  # makes room: it may be waiting to put
            except queue.Empty:
                continue

    def _fill(self, consumed: dict[str, int]) -> None:
        assert self._ready is not None
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # a thread starts on GPU 0, and pinning memory would touch it
        while not self._stop.is_set():
            try:
                self._ready.put(self._batch(consumed))
            except Exception as error:
                self._ready.put(error)
                return
            consumed = self.samples.after(consumed, self.global_batch)

    def _batch(self, consumed: dict[str, int]) -> Batch:
        samples = self.samples.next(consumed, self.global_batch)
        together = self.micro_batch * self.world
        micro_batches = [self._micro_batch(samples[first:][:together]) for first in range(0, len(samples), together)]
        return Batch(micro_batches, sum(int((m.targets_BT != IGNORED).sum()) for m in micro_batches))

    def _micro_batch(self, samples: list[tuple[Windows, int]]) -> MicroBatch:
        """This rank's of the samples of a micro-step."""
        group = range(self.rank - self.shard.rank, self.rank - self.shard.rank + self.shard.world)
        micro = {}
        for rank in group:
            of_rank = samples[rank * self.micro_batch :][: self.micro_batch]
            micro[rank] = read(of_rank, self.shard.vocab_size)
        plan = plan_lookup([batch.tokens_BT.flatten() for batch in micro.values()], self.shard, self.dtype)
        mine = replace(micro[self.rank], plan=plan)
        return mine.moved(Tensor.pin_memory, plan.pin_memory()) if self.device.type == "cuda" else mine

    def _to_device(self, micro: MicroBatch) -> MicroBatch:
        assert micro.plan is not None
        return micro.moved(lambda tensor: _sent(tensor, self.device), micro.plan.to(self.device))


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device. From pinned memory the host does not wait for it."""
    return tensor.to(device, non_blocking=True)


def read(samples: list[tuple[Windows, int]], vocab_size: int) -> MicroBatch:
    """These windows, on the host. ValueError on an id outside [0, vocab_size)."""
    batch = samples[0][0].empty_batch(len(samples))
    for b, (windows, index) in enumerate(samples):
        windows.fill(index, batch.row(b))
    return _checked(batch, vocab_size)


def _checked(batch: Window, vocab_size: int) -> MicroBatch:
    smallest, largest = int(batch.tokens_T.min()), int(max(batch.tokens_T.max(), batch.targets_T.max()))
    if smallest < 0:
        raise ValueError(f"the data holds id {smallest}: an id must not be negative")
    if largest >= vocab_size:
        raise ValueError(f"the data holds id {largest}, but vocab.size={vocab_size}: it needs a larger vocabulary")
    return MicroBatch(*(None if part is None else torch.from_numpy(part) for part in batch))  # type: ignore[arg-type]


def validation_batches(
    windows: Windows, most: int, *, batch: int, rank: int, world: int, vocab_size: int, device: torch.device
) -> Iterator[MicroBatch]:
    """The first `most` windows (0: all) in order, dealt to the ranks; every rank gets as many batches.

    Where the windows run out a batch is filled up with windows without targets.
    """
    n = min(len(windows), most) if most else len(windows)
    for start in range(0, n, batch * world):
        mine = range(start + rank * batch, start + (rank + 1) * batch)
        micro = read([(windows, min(i, n - 1)) for i in mine], vocab_size)
        micro.targets_BT[max(0, n - mine.start) :] = IGNORED
        yield micro.moved(lambda tensor: _sent(tensor.pin_memory() if device.type == "cuda" else tensor, device))
