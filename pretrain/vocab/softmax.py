"""Softmax statistics of one shard, and of all shards together; no logit crosses.

m tokens, v rows of this shard, p shards.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 2**13  # columns of a product at once


@dataclass(frozen=True)
class ShardSoftmax:
    """A chunk's logits on this shard, as distances from their largest, and what sums to the softmax: [m, v], [m]."""

    shifted_mv: Tensor
    exp_mv: Tensor
    max_m: Tensor
    sum_m: Tensor

    @classmethod
    def of(cls, logits_mv: Tensor) -> "ShardSoftmax":
        """A shard without rows has a finite maximum below all others."""
        if logits_mv.shape[1]:
            max_m = logits_mv.amax(1)
        else:
            max_m = logits_mv.new_full((len(logits_mv),), torch.finfo(logits_mv.dtype).min)
        shifted_mv = logits_mv - max_m.unsqueeze(1)
        exp_mv = shifted_mv.exp()
        return cls(shifted_mv, exp_mv, max_m, exp_mv.sum(1))


@dataclass(frozen=True)
class GlobalSoftmax:
    """The softmax over all shards, from what each says of its own. below_pm: its maximum less the largest of all."""

    lse_m: Tensor
    log_sum_m: Tensor  # of exp(logit - the largest)
    below_pm: Tensor
    sum_pm: Tensor
    weight_pm: Tensor  # the factor from a shard's sums to probabilities

    @classmethod
    def of(cls, max_pm: Tensor, sum_pm: Tensor) -> "GlobalSoftmax":
        max_m = max_pm.amax(0)
        below_pm = max_pm - max_m
        scale_pm = below_pm.exp()
        sum_m = (sum_pm * scale_pm).sum(0)
        return cls(max_m + sum_m.log(), sum_m.log(), below_pm, sum_pm, scale_pm / sum_m)

    def entropy(self, weighted_pm: Tensor) -> Tensor:
        """weighted: Σ exp(shifted) · shifted of each shard."""
        mean_m = (self.weight_pm * (weighted_pm + self.sum_pm * self.below_pm)).sum(0)
        return (self.log_sum_m - mean_m).clamp(min=0)

    def kl(self, other: "GlobalSoftmax", cross_pm: Tensor) -> Tensor:
        """KL(self ‖ other). cross: Σ exp(own shifted) · (own shifted - other's shifted) of each shard."""
        mean_m = (self.weight_pm * (cross_pm + self.sum_pm * (self.below_pm - other.below_pm))).sum(0)
        return (mean_m - self.log_sum_m + other.log_sum_m).clamp(min=0)


def dot(a_mv: Tensor, b_mv: Tensor) -> Tensor:
    """Σ a · b of each token, [m], without a product of their size.

    A matmul of a row with a column adds one number after the other on a CPU: in fp32 it is wrong by 1e-5 at 128k rows.
    """
    blocks = zip(a_mv.split(BLOCK, dim=1), b_mv.split(BLOCK, dim=1), strict=True)
    return torch.stack([(a_mb * b_mb).sum(1) for a_mb, b_mb in blocks]).sum(0)
