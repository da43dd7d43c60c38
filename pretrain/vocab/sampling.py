"""Sampling on the shards, without gathering the logits."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

from ..config.generation import check_sampling
from .collectives import all_gather, on_host
from .readout import logits_in
from .shard import VocabShard

SCORE_BYTES = 32 * 2**20  # of scores at once
ADDED, FACTORS = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # of SplitMix64


@torch.no_grad()
def sample(
    hidden_ND: Tensor,
    weight_vD: Tensor,
    *,
    shard: VocabShard,
    seed: int,
    draw: int,
    group: dist.ProcessGroup | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    softcap: float | None = None,
    same_noise: bool = False,
) -> Tensor:
    """Samples one id per hidden state, [N]. All ranks of the group pass the same hidden states and get the same ids.

    The sample is the largest of logit / temperature + Gumbel noise, over the rows that `top_k` and then `top_p` keep.
    The noise is a function of (seed, draw, position in N, row), so the sample is the same for any number of ranks.
    `same_noise`: all hidden states get the noise of position 0. temperature=0 takes the largest logit. Ties go to the
    lowest id, but all ties at the edge of `top_p` are kept. Memory: SCORE_BYTES of scores, and a few times as much to
    draw from them; n positions are processed at once. Collectives for n positions: one gather of the winners, 3·n
    floats; for `top_k` one gather of k·n; for `top_p` one of 2·n, and another of n and of winners for each rejected
    draw; a position takes 1 / top_p draws on average at most. Raises ValueError if a setting is out of range.

    >>> rows, shard = torch.eye(4), VocabShard.of(rank=0, world=1, vocab_size=4, multiple=1)
    >>> hidden = torch.tensor([[0.0, 3.0, 1.0, 2.0]])  # with these rows, the logits
    >>> sample(hidden, rows, shard=shard, seed=0, draw=0, temperature=0.0)
    tensor([1])
    >>> [sample(hidden, rows, shard=shard, seed=0, draw=draw, top_k=2).item() for draw in range(5)]
    [3, 1, 1, 3, 1]
    """
    check_sampling(temperature, top_k, top_p)
    ids_v = torch.arange(shard.start, shard.start + shard.valid_rows, device=hidden_ND.device)
    rows_vD = weight_vD[: shard.valid_rows]
    found = []
    for start in range(0, len(hidden_ND), at_once := max(1, SCORE_BYTES // (8 * shard.rows_per_rank))):
        scores_nv = logits_in(torch.float64, hidden_ND[start : start + at_once], rows_vD, softcap)
        if temperature == 0:
            found.append(_winners(scores_nv, scores_nv, ids_v, group)[0])
            continue
        scores_nv /= temperature
        if top_k is not None and top_k < shard.vocab_size:
            scores_nv = _keep_top_k(scores_nv, top_k, shard, group)
        positions_n = torch.arange(*((0, 1) if same_noise else (start, start + len(scores_nv))), device=ids_v.device)
        noise_nv = _gumbel(seed, draw, positions_n, ids_v)
        found.append(_draw(scores_nv, noise_nv, ids_v, top_p, group))
    return torch.cat(found) if found else ids_v.new_zeros(0)


def _draw(scores_nv: Tensor, noise_nv: Tensor, ids_v: Tensor, top_p: float, group: dist.ProcessGroup | None) -> Tensor:
    """Returns the ids [n] of the largest score + noise, over the rows that `top_p` keeps.

    Draws from all rows. If `top_p` does not keep the row drawn, neither does it keep rows with lower scores: draws
    again, with the same noise, without them. So no threshold is searched, and most positions are drawn once.
    """
    nucleus = _Nucleus(scores_nv, top_p, group) if top_p < 1 else None
    while True:
        drawn_n, score_n1 = _winners(scores_nv + noise_nv, scores_nv, ids_v, group)
        if nucleus is None:
            return drawn_n
        outside_n = nucleus.outside(score_n1)
        if not on_host(outside_n.any()):
            return drawn_n
        scores_nv = scores_nv.masked_fill(outside_n.unsqueeze(1) & (scores_nv <= score_n1), -math.inf)


def _winners(
    noisy_nv: Tensor, scores_nv: Tensor, ids_v: Tensor, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """Returns the ids [n] of the largest noisy scores of all shards, and their scores [n, 1]. One gather."""
    if len(ids_v) == 0:
        best_3n = noisy_nv.new_full((3, len(noisy_nv)), -math.inf)
    else:
        best_n, index_n = noisy_nv.max(1)
        score_n = scores_nv.gather(1, index_n.unsqueeze(1)).squeeze(1)
        best_3n = torch.stack([best_n, score_n, ids_v[index_n].double()])  # exact: an id is below 2^53
    best_p3n = all_gather(best_3n, group)
    winner_n = best_p3n[:, 0].max(0).indices  # the lowest rank on ties, so the lowest id
    _, score_n, id_n = best_p3n[winner_n, :, torch.arange(len(winner_n), device=winner_n.device)].unbind(1)
    return id_n.long(), score_n.unsqueeze(1)


def _keep_top_k(scores_nv: Tensor, k: int, shard: VocabShard, group: dist.ProcessGroup | None) -> Tensor:
    """Sets all scores except the k largest of all shards to -inf; among equal ones the lowest ids are kept."""
    n, v = scores_nv.shape
    values_nk = scores_nv.new_full((n, k), -math.inf)
    values_nk[:, : min(k, v)] = scores_nv.topk(min(k, v)).values
    values_pnk = all_gather(values_nk, group)
    edge_n1 = values_pnk.transpose(0, 1).flatten(1).topk(k).values[:, -1:]
    wanted_n1 = k - (values_pnk > edge_n1).sum((0, 2)).unsqueeze(1)  # scores at the edge that are kept
    before_n1 = (values_pnk[: shard.rank] == edge_n1).sum((0, 2)).unsqueeze(1)
    equal_nv = scores_nv == edge_n1
    kept_nv = (scores_nv > edge_n1) | (equal_nv & (before_n1 + equal_nv.cumsum(1) <= wanted_n1))
    return scores_nv.masked_fill(~kept_nv, -math.inf)


class _Nucleus:
    """The smallest set of largest scores that has `top_p` of the probability, and all ties at its edge."""

    def __init__(self, scores_nv: Tensor, top_p: float, group: dist.ProcessGroup | None) -> None:
        """One gather of 2·n floats."""
        lowest_n1 = scores_nv.new_full((len(scores_nv), 1), torch.finfo(scores_nv.dtype).min)
        top_n1 = torch.cat([scores_nv, lowest_n1], 1).amax(1, keepdim=True)  # finite, also without rows
        self.group, self.scores_nv, self.mass_nv = group, scores_nv, (scores_nv - top_n1).exp_()
        tops_pn, masses_pn = all_gather(torch.stack([top_n1.squeeze(1), self.mass_nv.sum(1)]), group).unbind(1)
        highest_n = tops_pn.amax(0)
        self.scale_n = (top_n1.squeeze(1) - highest_n).exp()  # from this shard's top to the highest
        self.needed_n = top_p * (masses_pn * (tops_pn - highest_n).exp()).sum(0)

    def outside(self, score_n1: Tensor) -> Tensor:
        """True [n] for a score outside the set: the scores above it have enough. One gather of n floats."""
        above_n = (self.mass_nv * (self.scores_nv > score_n1)).sum(1) * self.scale_n
        return all_gather(above_n, self.group).sum(0) >= self.needed_n


def _gumbel(seed: int, draw: int, positions_n: Tensor, ids_v: Tensor) -> Tensor:
    """Returns Gumbel noise [n, v] in float64, made from a hash (SplitMix64, Steele et al., 2014).

    The hash is of seed, draw, position and row.
    """
    state = _signed(_mixed(_mixed(seed) + draw))
    positions_n1 = _mix(positions_n + state).unsqueeze(1)
    bits_nv = _shift(_mix(positions_n1 + ids_v), 12)  # 52 bits: with 53, adding a half could round up to 1
    return bits_nv.double().add_(0.5).div_(2**52).log_().neg_().log_().neg_()


def _mix(x: Tensor) -> Tensor:
    x = x + _signed(ADDED)  # int64 wraps around, as SplitMix64 wants
    x = _shift(x, 30).bitwise_xor_(x).mul_(_signed(FACTORS[0]))
    x = _shift(x, 27).bitwise_xor_(x).mul_(_signed(FACTORS[1]))
    return _shift(x, 31).bitwise_xor_(x)


def _mixed(x: int) -> int:
    """The same for one number: 64 bits without a sign, and no operation on the device."""
    x = (x + ADDED) % 2**64
    x = (x ^ x >> 30) * FACTORS[0] % 2**64
    x = (x ^ x >> 27) * FACTORS[1] % 2**64
    return x ^ x >> 31


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shifts to the right and fills with zeros; torch's own shift keeps the sign."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word
