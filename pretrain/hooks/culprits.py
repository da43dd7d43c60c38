"""Names what is behind a loss spike: samples, their documents, and rows of the matrix. Apart from guard.py, which
decides.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..monitor import blocks
from ..vocab import VocabParallelEmbedding
from ..vocab.collectives import on_host
from .base import StepReport, TrainerView

MOST_ROWS = 5
MOST_DOCUMENTS = 8


@dataclass(frozen=True)
class Culprits:
    """The batch of a step, and what stands out in it. Equal on all ranks."""

    samples: list[int]  # first sample of the batch, and one after the last
    worst: list[int]  # samples of the micro-batch with the highest loss
    documents: list[str]  # of these samples, as `python -m pretrain.data show` names them
    rows: list[int]  # of the matrix, with the largest gradient norms first


def culprits(trainer: TrainerView, report: StepReport) -> Culprits:
    """Finds them. To be called between backward and update. An all-reduce of a loss per micro-batch of all ranks, and
    a gather of `MOST_ROWS` ids and norms over the vocab group.
    """
    loader, consumed = trainer.batches, trainer.state.samples
    size = loader.size(consumed)
    numbers = loader.samples.numbers(consumed, size)
    micro, rank = divmod(highest(trainer, report), loader.world)
    first = (micro * loader.world + rank) * loader.micro_batch
    worst = slice(first, first + loader.micro_batch)
    documents: dict[str, None] = {}
    for windows, index in loader.samples.next(consumed, size)[worst]:
        documents |= {f"{span.file.prefix.name}, document {span.document:,}": None for span in windows.documents(index)}
    named = [*documents][:MOST_DOCUMENTS]
    if len(documents) > MOST_DOCUMENTS:
        named.append(f"and {len(documents) - MOST_DOCUMENTS} more")
    return Culprits([numbers[0], numbers[-1] + 1], numbers[worst], named, largest_rows(trainer.model.vocab))


def highest(trainer: TrainerView, report: StepReport) -> int:
    """Returns the number of the micro-batch with the highest loss, counted as the samples are: rank by rank."""
    mesh, mine = trainer.mesh, torch.stack(report.losses).double()
    losses = torch.zeros(len(mine), mesh.data_world, dtype=torch.float64, device=mesh.device)
    losses[:, mesh.data_rank] = torch.where(mine.isfinite(), mine, torch.inf)
    dist.all_reduce(losses)
    return int(on_host(losses).argmax())


@torch.no_grad()
def largest_rows(vocab: VocabParallelEmbedding) -> list[int]:
    """Returns the rows with the largest gradient norms, over all matrices, largest first. See `culprits`."""
    gradients = [rows.grad for rows in vocab.named_rows().values() if rows.grad is not None]
    valid = vocab.shard.valid_rows
    squares_v = torch.zeros(valid, dtype=torch.float64, device=vocab.weight.device)
    for grad_vD in gradients:
        for part in blocks(valid, grad_vD.shape[1]):
            squares_v[part] += grad_vD[part].double().square().sum(1)
    squares_v = torch.where(squares_v.isfinite(), squares_v, torch.inf)
    found = squares_v.topk(min(MOST_ROWS, valid))
    best_2k = torch.full((2, MOST_ROWS), -1.0, dtype=torch.float64, device=squares_v.device)
    best_2k[0, : len(found.values)], best_2k[1, : len(found.values)] = found.values, found.indices + vocab.shard.start
    parts: list[Tensor] = [best_2k]
    if vocab.group is not None:
        parts = [torch.empty_like(best_2k) for _ in range(vocab.shard.world)]
        dist.all_gather(parts, best_2k, group=vocab.group)
    pairs = on_host(torch.cat(parts, dim=1)).T.tolist()
    return [int(row) for square, row in sorted(pairs, key=lambda pair: (-pair[0], pair[1])) if square > 0][:MOST_ROWS]
