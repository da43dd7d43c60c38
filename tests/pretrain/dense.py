"""Dense reference: one process, whole weights, plain autograd; no shards, no engine."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config.job import JobConfig
from pretrain.data import IGNORED, Order, PackedWindows, Windows, open_corpus
from pretrain.optim import body_optimizer, lr_at
from pretrain.vocab import VocabParallelEmbedding, VocabShard
from tests.pretrain.tiny import VOCAB


class DenseModel(nn.Module):
    """Reference model: equal initial weights, unsharded, in one process, under plain autograd."""

    def __init__(self, config: JobConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.body = config.model.body()
        for name, parameter in self.body.named_parameters():
            parameter.data = self.body.initial_rows(name, config.seed, 0, len(parameter)).to(dtype)
        shard = VocabShard.of(0, 1, VOCAB, config.vocab.multiple)
        owner = VocabParallelEmbedding(config.vocab, shard, config.model.width, seed=config.seed, dtype=dtype)
        self.weight, self.head_weight = owner.weight, owner.head_weight

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        head = self.weight if self.head_weight is None else self.head_weight
        logits = self.body(F.embedding(tokens, self.weight)) @ head[:VOCAB].T
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)

    def loss_of_documents(self, tokens: Tensor, targets: Tensor, starts: Tensor) -> Tensor:
        """Loss of each document separately, without packing."""
        total = torch.zeros((), dtype=self.weight.dtype)
        for sequence in zip(tokens, targets, starts, strict=True):
            for start in sequence[2].unique():
                document_tokens, document_targets = (part[sequence[2] == start][None] for part in sequence[:2])
                valid = int((document_targets != IGNORED).sum())
                if valid:
                    total = total + self.loss(document_tokens, document_targets) * valid
        return total / (targets != IGNORED).sum()


def windows_of(config: JobConfig, step: int) -> list[Tensor]:
    """Global batch of a step: tokens and targets [global_batch, T], and starts of documents if masked."""
    corpus = open_corpus(Path(config.data.path))
    if config.data.packing == "best_fit":
        windows: Windows = PackedWindows(corpus.train, config.seq_len)
    else:
        windows = Windows(corpus.train, config.seq_len, masked=config.data.masked)
    order = Order(len(windows), config.seed, corpus.name)
    begin, end = begins_of(config)[step : step + 2]
    chosen = [windows[index] for index in order(begin, end - begin).tolist()]
    return [torch.from_numpy(np.stack(part)) for part in zip(*chosen, strict=True) if part[0] is not None]


def begins_of(config: JobConfig) -> list[int]:
    """First sample of each step, and the end of the last one."""
    begins = [0]
    for _ in range(config.train.steps):
        begins.append(begins[-1] + [size for begin, size in config.train.batches.sizes if begin <= begins[-1]][-1])
    return begins


def scale_to_width(body: nn.Module, ratio: float) -> None:
    """Scales initial values as muP has them, for `ratio` times the base width."""
    for name, parameter in body.named_parameters():
        if name.startswith("blocks.") and parameter.dim() == 2:
            parameter.data *= ratio**-0.5
        elif name == "norm.weight":
            parameter.data /= ratio


class Dense(NamedTuple):
    """Results of a run: loss and norm per step, and final weights by their names in a checkpoint."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def dense_training(config: JobConfig) -> Dense:
    """Plain training loop with AdamW, clip and schedule."""
    model = DenseModel(config, torch.float32)
    optimizer = body_optimizer(config.optim).build(model.parameters(), config.optim, config.optim.body)
    losses, norms = [], []
    for step in range(config.train.steps):
        loss = (model.loss_of_documents if config.data.masked else model.loss)(*windows_of(config, step))
        losses.append(float(loss.detach()))
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)))
        progress = int if config.train.batches.constant else begins_of(config).__getitem__
        optimizer.step(lr_at(config.optim, step, config.train.steps, progress))
    weights = {name: parameter.detach() for name, parameter in model.body.named_parameters()}
    weights["embedding.weight"] = model.weight.detach()
    if model.head_weight is not None:
        weights["head.weight"] = model.head_weight.detach()
    return Dense(losses, norms, weights)
