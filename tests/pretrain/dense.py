"""The truth: one process, whole weights, plain autograd; no shard, no engine."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pretrain.config import TrainConfig
from pretrain.data import Order, Windows, open_corpus
from pretrain.vocab import VocabParallelEmbedding, VocabShard
from tests.pretrain.tiny import VOCAB


class DenseModel(nn.Module):
    """The truth: the same initial weights, whole, in one process, under plain autograd."""

    def __init__(self, config: TrainConfig, dtype: torch.dtype) -> None:
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
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def windows_of(config: TrainConfig, step: int) -> tuple[Tensor, Tensor]:
    """The global batch of a step, tokens and targets [global_batch, T]."""
    corpus = open_corpus(Path(config.data.path))
    windows = Windows(corpus.train, config.seq_len)
    order = Order(len(windows), config.seed, corpus.name)
    size = config.train.global_batch
    chosen = [windows[order(sample)] for sample in range(step * size, (step + 1) * size)]
    tokens, targets = (torch.from_numpy(np.stack(part)) for part in zip(*chosen, strict=True))
    return tokens, targets


class Dense(NamedTuple):
    """A run: loss and norm of each step, and the weights at its end by their names in a checkpoint."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def dense_training(config: TrainConfig) -> Dense:
    """A plain training loop: AdamW, clip, schedule."""
    model = DenseModel(config, torch.float32)
    adamw = config.optim.adamw(model.parameters())
    losses, norms = [], []
    for step in range(config.train.steps):
        loss = model.loss(*windows_of(config, step))
        losses.append(float(loss.detach()))
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)))
        for group in adamw.param_groups:
            group["lr"] = config.optim.lr_at(step, config.train.steps)
        adamw.step()
        adamw.zero_grad()
    weights = {name: parameter.detach() for name, parameter in model.body.named_parameters()}
    weights["embedding.weight"] = model.weight.detach()
    if model.head_weight is not None:
        weights["head.weight"] = model.head_weight.detach()
    return Dense(losses, norms, weights)
