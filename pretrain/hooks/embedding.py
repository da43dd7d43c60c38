"""Monitor of the matrix: the gradients of its two uses side by side, and the state of its rows."""

import torch
from torch import Tensor

from ..checkpoint.state import HookState
from ..config.job import JobConfig
from ..mesh import Mesh
from ..monitor import Rows, blocks
from ..optim import VocabOptimizer
from ..vocab import VocabParallelEmbedding
from .base import Hook, Run, StepReport, TrainerView
from .seen import Seen


class EmbeddingHealth(Hook):
    """Measures the gradients of every n-th step, and the rows after it. See docs/tie.md for each measure.

    If the matrix is tied, a sampled step also keeps the lookup's gradient in a separate buffer. The training stays
    bit-identical. Traffic of a sampled step: an all-reduce of that buffer over `dp`, one of 2·V counts over all ranks;
    over the vocab group a few all-reduces of sums (D² numbers per matrix) and gathers of ids.
    """

    def __init__(self, every: int, vocab: VocabParallelEmbedding, vocab_optimizer: VocabOptimizer, mesh: Mesh) -> None:
        self.every, self.vocab, self.mesh, self.seen = every, vocab, mesh, Seen(vocab.shard, mesh)
        self.sampled = False
        self.uses_v3: Tensor | None = None  # of the present step, if it is sampled
        vocab_optimizer.observers.append(self.observe)

    def before_step(self, trainer: TrainerView) -> None:
        self.sampled, self.uses_v3 = (trainer.state.step + 1) % self.every == 0, None
        if self.sampled and self.vocab.head_weight is None:
            self.vocab.input_grad_vD = torch.zeros_like(self.vocab.weight, requires_grad=False)

    def after_step(self, trainer: TrainerView, report: StepReport) -> None:
        self.seen.after_step(trainer, report)
        if self.uses_v3 is not None:
            self._measure(report)

    def state_dict(self) -> HookState:
        return self.seen.state_dict()

    def load_state_dict(self, state: HookState) -> None:
        self.seen.load_state_dict(state)

    def observe(self) -> None:
        """Keeps per row, before the clip, the squares of both uses' gradients and their product."""
        if not self.sampled:
            return
        vocab, entering_vD = self.vocab, self.vocab.input_grad_vD
        vocab.input_grad_vD = None
        grad_vD = vocab.weight.grad
        assert grad_vD is not None
        two = vocab.head_weight is not None  # untied from the start, or since this step
        if two:
            entering_vD = grad_vD
        assert entering_vD is not None
        if not two:
            self.mesh.sum_replicas([entering_vD])
        self.uses_v3 = torch.zeros(vocab.shard.rows, 3, dtype=torch.float64, device=grad_vD.device)
        for part in blocks(vocab.shard.valid_rows, grad_vD.shape[1]):
            enter = entering_vD[part].double()
            if vocab.head_weight is not None:
                assert vocab.head_weight.grad is not None
                leave = vocab.head_weight.grad[part].double()
            else:
                leave = grad_vD[part].double() - enter
            self.uses_v3[part] = torch.stack(
                [enter.square().sum(1), leave.square().sum(1), (enter * leave).sum(1)], dim=1
            )

    @torch.no_grad()
    def _measure(self, report: StepReport) -> None:
        assert self.uses_v3 is not None
        counts_v2 = self.seen.gather()
        rows = Rows(self.vocab.shard, self.vocab.group, counts_v2)
        report.scalars.update(rows.gradients(self.uses_v3))
        report.scalars.update(rows.unseen())
        for title, name in (("embedding", "embedding.weight"), ("head", "head.weight")):
            weight_vD = self.vocab.named_rows().get(name)
            if weight_vD is not None:
                scalars, ids = rows.of_matrix(weight_vD)
                report.scalars.update({f"{title}_{key}": value for key, value in scalars.items()})
                report.rows.update({f"{title}_{key}": row_ids for key, row_ids in ids.items()})


def build(config: JobConfig, run: Run) -> EmbeddingHealth | None:
    """The hook, if monitor.embedding_every is not 0."""
    parts = run.parts
    if not config.monitor.embedding_every:
        return None
    return EmbeddingHealth(config.monitor.embedding_every, parts.model.vocab, parts.vocab_optimizer, parts.mesh)
