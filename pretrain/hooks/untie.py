"""Splits a tied matrix in two during a run, and measures how far the two move apart."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ..config.job import JobConfig
from ..monitor import blocks
from ..optim import VocabOptimizer
from ..vocab import VocabParallelEmbedding
from ..vocab.collectives import on_host
from .base import Hook, Run, StepReport, TrainerView


class UntieHook(Hook):
    """Splits the matrix before step vocab.untie_at + 1: the checkpoint of step untie_at still has one matrix.

    Every few steps from then on it adds `tie_distance`, ‖head - embedding‖ / ‖embedding‖, and `tie_cosine`, the mean
    over the rows of the cosine between a row of one and that of the other. A checkpoint keeps no other
    state: if it has a tensor of the head, `VocabParallelEmbedding.match` splits the matrix at the resume.
    """

    def __init__(
        self,
        vocab: VocabParallelEmbedding,
        vocab_optimizer: VocabOptimizer,
        every: int,
        wait_for_copy: Callable[[], None],
    ) -> None:
        self.vocab, self.vocab_optimizer, self.every, self.wait_for_copy = vocab, vocab_optimizer, every, wait_for_copy

    def before_step(self, trainer: TrainerView) -> None:
        if self.vocab.config.untie_at == trainer.state.step and self.vocab.head_weight is None:
            self.wait_for_copy()  # a running save asks for the matrices by name
            self.vocab_optimizer.add_copy(self.vocab.untie(), self.vocab.weight)

    def after_step(self, trainer: TrainerView, report: StepReport) -> None:
        if report.step % self.every == 0 and self.vocab.head_weight is not None:
            report.scalars.update(self.drift(self.vocab.head_weight))

    @torch.no_grad()
    def drift(self, head_vD: Tensor) -> dict[str, float]:
        """Measures both in float64, in one pass. One all-reduce of three numbers over the vocab group."""
        sums = torch.zeros(3, dtype=torch.float64, device=head_vD.device)
        for part in blocks(self.vocab.shard.valid_rows, head_vD.shape[1]):
            embedding, head = self.vocab.weight[part].double(), head_vD[part].double()
            norms = embedding.norm(dim=1) * head.norm(dim=1)
            cosines = torch.where(norms > 0, (embedding * head).sum(1) / norms, 0.0)
            sums += torch.stack([(head - embedding).square().sum(), embedding.square().sum(), cosines.sum()])
        if self.vocab.group is not None:
            dist.all_reduce(sums, group=self.vocab.group)
        apart, whole, cosine = on_host(sums).tolist()
        return {
            "tie_distance": (apart / whole) ** 0.5 if whole else 0.0,
            "tie_cosine": cosine / self.vocab.shard.vocab_size,
        }


def build(config: JobConfig, run: Run) -> UntieHook | None:
    """The hook, if vocab.untie_at is set."""
    if config.vocab.untie_at is None:
        return None
    return UntieHook(run.parts.model.vocab, run.parts.vocab_optimizer, config.log.every, run.manager.wait_for_copy)
