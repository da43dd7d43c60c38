"""Softmax statistics of one shard, and of all shards together; no logit crosses.

m tokens, v rows of this shard, p shards.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 2**13  # columns that are multiplied at once


@dataclass(frozen=True)
class ShardSoftmax:
    """Softmax of a chunk's logits on this shard, before the shards are merged: [m, v] and [m].

    shifted: logit minus the shard's maximum; exp: its exponential; sum: the sum of these over the shard's rows.
    """

    shifted_mv: Tensor
    exp_mv: Tensor
    max_m: Tensor
    sum_m: Tensor

    @classmethod
    def of(cls, logits_mv: Tensor) -> "ShardSoftmax":
        """Computes the softmax of one shard. A shard without rows gets a finite maximum below all others."""
        if logits_mv.shape[1]:
            max_m = logits_mv.amax(1)
        else:
            max_m = logits_mv.new_full((len(logits_mv),), torch.finfo(logits_mv.dtype).min)
        shifted_mv = logits_mv - max_m.unsqueeze(1)
        exp_mv = shifted_mv.exp()
        return cls(shifted_mv, exp_mv, max_m, exp_mv.sum(1))


@dataclass(frozen=True)
class GlobalSoftmax:
    """Softmax over all shards, merged from the maximum and the sum of each."""

    lse_m: Tensor  # log-sum-exp of all logits
    log_sum_m: Tensor  # log of Σ exp(logit - the largest logit)
    below_pm: Tensor  # the shard's maximum minus the largest logit; at most 0
    sum_pm: Tensor  # the shard's own sum
    weight_pm: Tensor  # the factor that turns a shard's sums into probabilities

    @classmethod
    def of(cls, max_pm: Tensor, sum_pm: Tensor) -> "GlobalSoftmax":
        """Merges the shards, which come in rank order."""
        max_m = max_pm.amax(0)
        below_pm = max_pm - max_m
        scale_pm = below_pm.exp()
        sum_m = (sum_pm * scale_pm).sum(0)
        return cls(max_m + sum_m.log(), sum_m.log(), below_pm, sum_pm, scale_pm / sum_m)

    def entropy(self, weighted_pm: Tensor) -> Tensor:
        """Returns the entropy [m], in nats. `weighted_pm`: Σ exp(shifted) · shifted of each shard."""
        mean_m = (self.weight_pm * (weighted_pm + self.sum_pm * self.below_pm)).sum(0)
        return (self.log_sum_m - mean_m).clamp(min=0)

    def kl(self, other: "GlobalSoftmax", cross_pm: Tensor) -> Tensor:
        """Returns KL(self ‖ other) [m], in nats.

        `cross_pm`: Σ exp(own shifted) · (own shifted - other's shifted) of each shard.
        """
        mean_m = (self.weight_pm * (cross_pm + self.sum_pm * (self.below_pm - other.below_pm))).sum(0)
        return (mean_m - self.log_sum_m + other.log_sum_m).clamp(min=0)


def dot(a_mv: Tensor, b_mv: Tensor) -> Tensor:
    """Returns Σ a · b per token, [m], without a product of the inputs' size.

    A CPU's matmul of a row with a column adds one number after the other: in fp32 its error is 1e-5 at 128k rows.
    """
    blocks = zip(a_mv.split(BLOCK, dim=1), b_mv.split(BLOCK, dim=1), strict=True)
    return torch.stack([(a_mb * b_mb).sum(1) for a_mb, b_mb in blocks]).sum(0)
