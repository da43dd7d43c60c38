"""Batches of this rank, prepared by a thread during the previous step."""

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..config.lengths import Batches
from ..vocab import VocabShard
from ..vocab.lookup import LookupPlan, plan_lookup
from .dataset import IGNORED, Window, Windows
from .samples import Samples

LOOK_AHEAD = 32  # batches whose blocks are fetched in advance, if they come from a store
CLOSE_SECONDS = 5.0  # for which `close` waits for the thread: it may wait for a store


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of one forward and backward: int64 [B, T], on the rank's device."""

    tokens_BT: Tensor
    targets_BT: Tensor  # IGNORED: no target
    starts_BT: Tensor | None = None  # where each token's document begins; None: documents are not separated
    plan: LookupPlan | None = None  # exchange of rows for the lookup of the tokens; None: the lookup plans it

    def moved(self, move: Callable[[Tensor], Tensor], plan: LookupPlan | None = None) -> "MicroBatch":
        """Returns the micro-batch with `move` applied to its tensors."""
        starts_BT = None if self.starts_BT is None else move(self.starts_BT)
        return MicroBatch(move(self.tokens_BT), move(self.targets_BT), starts_BT, plan)


@dataclass(frozen=True)
class Batch:
    """Part of one global batch on this rank."""

    micro_batches: list[MicroBatch]
    n_targets: int  # targets that are not IGNORED


class BatchLoader:
    """Serves the samples of the run in order, per step as many over all ranks as `batches` says.

    A rank reads the tokens of its whole vocab group (`shard.world` neighbouring ranks). Therefore it can plan its part
    of the group's lookup, of rows in `dtype`, without communication.

    The state is only the number of samples served per corpus. A run can continue with another number of ranks,
    micro-batch or global batch. end: first sample behind the run's last step; it is not fetched in advance. Raises
    ValueError if a token id is not below the vocabulary size.
    """

    def __init__(
        self,
        samples: Samples,
        *,
        batches: Batches,
        micro_batch: int,
        rank: int,
        world: int,
        shard: VocabShard,
        dtype: torch.dtype,
        device: torch.device,
        prefetch: int,
        end: float = math.inf,
    ) -> None:
        self.samples, self.device, self.prefetch, self.end = samples, device, prefetch, end
        self.batches, self.micro_batch, self.rank, self.world = batches, micro_batch, rank, world
        self.shard, self.dtype = shard, dtype
        self.consumed: dict[str, int] = {}
        self._ready: queue.Queue[Batch | Exception] | None = None
        self._stop = threading.Event()

    def state_dict(self) -> dict[str, int]:
        return dict(self.consumed)

    def restart(self, state: dict[str, int], samples: Samples) -> None:
        """Continues at another position, with other samples. Batches prepared so far are dropped."""
        self.close()
        self._ready, self._stop, self.samples = None, threading.Event(), samples
        self.load_state_dict(state)

    def load_state_dict(self, state: dict[str, int]) -> None:
        assert self._ready is None, "the position must be set before the first batch"
        self.consumed = dict(state)

    def epochs(self) -> dict[str, float]:
        """Epochs completed per corpus, by title, as fractions."""
        return self.samples.epochs(self.consumed)

    def __next__(self) -> Batch:
        if self._ready is None:
            self._ready = queue.Queue(self.prefetch)
            arguments = self.consumed, self._ready, self._stop
            self._thread = threading.Thread(target=self._fill, args=arguments, daemon=True, name="loader")
            self._thread.start()
        batch = self._ready.get()
        if isinstance(batch, Exception):
            raise batch
        self.consumed = self._after(self.consumed)
        return Batch([sent(micro, self.device) for micro in batch.micro_batches], batch.n_targets)

    def close(self) -> None:
        """Stops the thread. One that waits for a store is left alone: it ends when it has its answer."""
        self._stop.set()
        late = time.monotonic() + CLOSE_SECONDS
        while self._ready is not None and self._thread.is_alive() and time.monotonic() < late:
            try:
                self._ready.get(timeout=0.05)  # makes room: the thread may be blocked in put
            except queue.Empty:
                continue

    def _fill(self, consumed: dict[str, int], ready: "queue.Queue[Batch | Exception]", stop: threading.Event) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)  # a new thread uses GPU 0; pinning memory would allocate there
        ahead, batches = consumed, 0  # the look-ahead's position, and how many batches it is in front
        while not stop.is_set():
            try:
                while self.samples.remote and batches < LOOK_AHEAD and sum(ahead.values()) < self.end:
                    self._prefetch(ahead)
                    ahead, batches = self._after(ahead), batches + 1
                made: Batch | Exception = self._batch(consumed)
            except Exception as error:
                made = error
            if stop.is_set():  # no step will read the batch
                return
            ready.put(made)
            if isinstance(made, Exception):
                return
            consumed, batches = self._after(consumed), batches - 1

    def _prefetch(self, consumed: dict[str, int]) -> None:
        """Starts to fetch the windows that this rank reads of the next batch."""
        samples = self.samples.next(consumed, self.size(consumed))
        group = vocab_group(self.rank, self.shard)
        for i, (windows, index) in enumerate(samples):
            if i // self.micro_batch % self.world in group:
                windows.prefetch([index])

    def size(self, consumed: dict[str, int]) -> int:
        """Size of the next batch, over all ranks: that at its first sample, which may follow samples left out."""
        return self.batches.size_at(self.samples.start(consumed))

    def _after(self, consumed: dict[str, int]) -> dict[str, int]:
        return self.samples.after(consumed, self.size(consumed))

    def _batch(self, consumed: dict[str, int]) -> Batch:
        samples = self.samples.next(consumed, self.size(consumed))
        together = self.micro_batch * self.world
        micro_batches = [self._micro_batch(samples[first:][:together]) for first in range(0, len(samples), together)]
        return Batch(micro_batches, sum(int((m.targets_BT != IGNORED).sum()) for m in micro_batches))

    def _micro_batch(self, samples: list[tuple[Windows, int]]) -> MicroBatch:
        """Builds this rank's micro-batch from the samples of all ranks."""
        micro = [
            read(samples[rank * self.micro_batch :][: self.micro_batch], self.shard.vocab_size)
            for rank in vocab_group(self.rank, self.shard)
        ]
        return planned(micro, self.shard, self.dtype, self.device)


def vocab_group(rank: int, shard: VocabShard) -> range:
    """Returns the ranks of the vocab group of `rank`: neighbours, in the order of their rows."""
    return range(rank - shard.rank, rank - shard.rank + shard.world)


def planned(micro_p: list[MicroBatch], shard: VocabShard, dtype: torch.dtype, device: torch.device) -> MicroBatch:
    """Returns this rank's micro-batch with its lookup plan, in pinned memory for a GPU.

    micro_p: of all ranks of the vocab group.
    """
    plan = plan_lookup([micro.tokens_BT.flatten() for micro in micro_p], shard, dtype)
    mine = replace(micro_p[shard.rank], plan=plan)
    return mine.moved(Tensor.pin_memory, plan.pin_memory()) if device.type == "cuda" else mine


def sent(micro: MicroBatch, device: torch.device) -> MicroBatch:
    """Copies to the device; from pinned memory asynchronously."""
    assert micro.plan is not None
    return micro.moved(lambda tensor: tensor.to(device, non_blocking=True), micro.plan.to(device))


def read(samples: list[tuple[Windows, int]], vocab_size: int) -> MicroBatch:
    """Reads these windows to the host. Raises ValueError if an id is outside [0, vocab_size)."""
    rows: dict[Windows, list[int]] = {}
    for b, (windows, _) in enumerate(samples):
        rows.setdefault(windows, []).append(b)
    parts = [windows.batch([samples[b][1] for b in mine]) for windows, mine in rows.items()]
    if len(parts) == 1:
        return _checked(parts[0], vocab_size)
    order = np.argsort([b for mine in rows.values() for b in mine])
    kinds = (some for some in zip(*parts, strict=True) if some[0] is not None)
    return _checked(Window(*(np.concatenate(some)[order] for some in kinds)), vocab_size)


def _checked(batch: Window, vocab_size: int) -> MicroBatch:
    smallest, largest = int(batch.tokens_T.min()), int(max(batch.tokens_T.max(), batch.targets_T.max()))
    if smallest < 0:
        raise ValueError(f"the data contains id {smallest}: ids must not be negative")
    if largest >= vocab_size:
        raise ValueError(f"the data contains id {largest}: vocab.size={vocab_size} must be larger")
    return MicroBatch(*(None if part is None else torch.from_numpy(part) for part in batch))  # type: ignore[arg-type]


def validation_batches(
    windows: Windows,
    most: int,
    *,
    batch: int,
    rank: int,
    world: int,
    shard: VocabShard,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[MicroBatch]:
    """Yields this rank's batches of the first `most` windows (0: all), in order. All ranks get the same number.

    As in training, a rank reads the windows of its whole vocab group and plans the lookup of rows in `dtype`. If there
    are too few windows for the last batch, it is filled with windows without targets.
    """
    n = min(len(windows), most) if most else len(windows)
    for member in vocab_group(rank, shard):
        for start in range(member * batch, n, batch * world):
            windows.prefetch(range(start, min(start + batch, n)))
    for start in range(0, n, batch * world):
        micro_p = []
        for member in vocab_group(rank, shard):
            first = start + member * batch
            micro = read([(windows, min(i, n - 1)) for i in range(first, first + batch)], shard.vocab_size)
            micro.targets_BT[max(0, n - first) :] = IGNORED
            micro_p.append(micro)
        yield sent(planned(micro_p, shard, dtype, device), device)
