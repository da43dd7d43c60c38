"""How far the two halves of a split matrix have moved apart."""

import torch
import torch.distributed as dist
from torch import Tensor

from ..vocab import VocabParallelEmbedding
from ..vocab.collectives import on_host
from .hook import StepReport, blocks


class TieDrift:
    """Every few steps, from the split on: `tie_distance`, ‖head - embedding‖ / ‖embedding‖, and `tie_cosine`, the mean
    over the rows of the cosine between a row of one and that of the other. A hook.
    """

    def __init__(self, vocab: VocabParallelEmbedding, every: int) -> None:
        self.vocab, self.every = vocab, every

    def __call__(self, trainer: object, report: StepReport) -> None:
        if report.step % self.every == 0 and self.vocab.head_weight is not None:
            report.scalars.update(self.measure(self.vocab.head_weight))

    @torch.no_grad()
    def measure(self, head_vD: Tensor) -> dict[str, float]:
        """In float64, one pass over both. One all-reduce of three numbers over the vocab group."""
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
