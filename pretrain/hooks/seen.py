"""Counts of how often each row of the matrix was used since the run began: as input, and as target."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..checkpoint.state import HookState, matrix_dtensor
from ..mesh import Mesh
from ..vocab import VocabShard
from .base import Hook, StepReport, TrainerView

SEEN = "monitor.seen"  # its name in a checkpoint


class Seen(Hook):
    """Counts ids on every rank. `gather` brings the counts to the owners of the rows.

    counts_v2: uses of this rank's rows up to the last `gather`, as input and as target. float64, exact up to 2^53.
    """

    def __init__(self, shard: VocabShard, mesh: Mesh) -> None:
        self.shard, self.mesh = shard, mesh
        self.counts_v2 = torch.zeros(shard.rows, 2, dtype=torch.float64, device=mesh.device)
        self._mine_2V = torch.zeros(2, shard.padded_size, dtype=torch.int64, device=mesh.device)

    def after_step(self, trainer: TrainerView, report: StepReport) -> None:
        for micro in report.micro_batches:
            self.add(micro.tokens_BT, micro.targets_BT)

    def state_dict(self) -> HookState:
        return {SEEN: matrix_dtensor(self.gather(), self.shard, self.mesh)}

    def load_state_dict(self, state: HookState) -> None:
        counts = state[SEEN]
        assert isinstance(counts, DTensor)
        self.counts_v2 = counts.to_local()

    def add(self, tokens_BT: Tensor, targets_BT: Tensor) -> None:
        """Counts ids of this rank; ignores targets below 0. No traffic."""
        for mine_V, ids in zip(self._mine_2V, (tokens_BT.flatten(), targets_BT.flatten()), strict=True):
            valid = ids >= 0
            mine_V.index_add_(0, torch.where(valid, ids, 0), valid.long())

    def gather(self) -> Tensor:
        """Returns `counts_v2` up to now. One all-reduce of 2·V numbers over all ranks."""
        dist.all_reduce(self._mine_2V)
        new_v2 = self._mine_2V[:, self.shard.start : self.shard.stop].T
        self.counts_v2 = self.counts_v2 + new_v2  # not in place: a save may still be reading the old tensor
        self._mine_2V.zero_()
        return self.counts_v2
