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
BETWEEN_CHECKS = 8  # bisections for `top_p` between two checks whether it has ended


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
    positions_N: Tensor | None = None,
) -> Tensor:
    """Samples one id per hidden state, [N]. All ranks of the group pass the same hidden states and get the same ids.

    The sample is the largest of logit / temperature + Gumbel noise, over the rows that `top_k` and then `top_p` keep.
    The noise is a function of (seed, draw, position in N, row), so the sample is the same for any number of ranks.
    `positions_N` [N] replaces the position in N: hidden states with the same number get the same noise.
    temperature=0 takes the largest logit. Ties go to the lowest id, but all ties at the edge of `top_p` are kept.
    Memory: SCORE_BYTES of scores, and a few times as much to draw from them; n positions are processed at once.
    Collectives for n positions: gathers of k values, sums of n floats (up to 64 of them for `top_p`), one gather of the
    winners. Raises ValueError if a setting is out of range.

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
    if positions_N is None:
        positions_N = torch.arange(len(hidden_ND), device=hidden_ND.device)
    found = []
    for start in range(0, len(hidden_ND), at_once := max(1, SCORE_BYTES // (8 * shard.rows_per_rank))):
        scores_nv = logits_in(torch.float64, hidden_ND[start : start + at_once], rows_vD, softcap)
        if temperature > 0:
            scores_nv /= temperature
            if top_k is not None and top_k < shard.vocab_size:
                scores_nv = _keep_top_k(scores_nv, ids_v, top_k, group)
            if top_p < 1:
                scores_nv = _keep_top_p(scores_nv, top_p, group)
            scores_nv += _gumbel(seed, draw, positions_N[start : start + at_once], ids_v)
        best_n, best_ids_n = _largest(scores_nv, ids_v)
        best_pn, ids_pn = all_gather(best_n, group), all_gather(best_ids_n, group)
        winner_n = best_pn.max(0).indices  # the lowest rank on ties, so the lowest id
        found.append(ids_pn.gather(0, winner_n.unsqueeze(0)).squeeze(0))
    return torch.cat(found) if found else ids_v.new_zeros(0)


def _largest(scores_Nv: Tensor, ids_v: Tensor) -> tuple[Tensor, Tensor]:
    if len(ids_v) == 0:
        return scores_Nv.new_full((len(scores_Nv),), -math.inf), ids_v.new_zeros(len(scores_Nv))
    best_N, index_N = scores_Nv.max(1)
    return best_N, ids_v[index_N]


def _keep_top_k(scores_Nv: Tensor, ids_v: Tensor, k: int, group: dist.ProcessGroup | None) -> Tensor:
    """Sets all scores except the k largest of all shards to -inf; among equal ones the lowest ids are kept."""
    N, v = scores_Nv.shape
    values_Nk = scores_Nv.new_full((N, k), -math.inf)
    candidates_Nk = ids_v.new_zeros(N, k)
    order_Nv = scores_Nv.sort(dim=1, descending=True, stable=True).indices[:, :k]
    values_Nk[:, : min(k, v)] = scores_Nv.gather(1, order_Nv)
    candidates_Nk[:, : min(k, v)] = ids_v[order_Nv]
    all_NK = all_gather(values_Nk, group).transpose(0, 1).flatten(1)
    ids_NK = all_gather(candidates_Nk, group).transpose(0, 1).flatten(1)
    last_N1 = all_NK.sort(dim=1, descending=True, stable=True).indices[:, k - 1 : k]
    edge_N1, edge_id_N1 = all_NK.gather(1, last_N1), ids_NK.gather(1, last_N1)
    kept_Nv = (scores_Nv > edge_N1) | ((scores_Nv == edge_N1) & (ids_v <= edge_id_N1))
    return scores_Nv.masked_fill(~kept_Nv, -math.inf)


def _keep_top_p(scores_Nv: Tensor, top_p: float, group: dist.ProcessGroup | None) -> Tensor:
    """Keeps the smallest set of largest scores that has `top_p` of the probability; sets the others to -inf.

    The set's lowest score is found by bisection, until it is the only score between the bounds; only masses and bounds
    cross the ranks.
    """
    floor_N1 = scores_Nv.new_full((len(scores_Nv), 1), -math.inf)  # for a shard without rows
    top_N1 = all_gather(torch.cat([scores_Nv, floor_N1], 1).amax(1, keepdim=True), group).amax(0)
    mass_Nv = (scores_Nv - top_N1).exp()
    needed_N = top_p * _total(mass_Nv.sum(1), group)
    low_N1, high_N1 = top_N1 - 800.0, top_N1 + 1.0  # exp(-800) is 0 in float64: there is no mass below it
    for turn in range(64):
        if turn % BETWEEN_CHECKS == BETWEEN_CHECKS - 1 and _one_left(scores_Nv, low_N1, high_N1, group):
            break
        middle_N1 = (low_N1 + high_N1) / 2
        enough_N1 = (_total((mass_Nv * (scores_Nv >= middle_N1)).sum(1), group) >= needed_N).unsqueeze(1)
        low_N1 = torch.where(enough_N1, middle_N1, low_N1)
        high_N1 = torch.where(enough_N1, high_N1, middle_N1)
    return scores_Nv.masked_fill(scores_Nv < low_N1, -math.inf)


def _one_left(scores_Nv: Tensor, low_N1: Tensor, high_N1: Tensor, group: dist.ProcessGroup | None) -> bool:
    """True if all scores of a position in [low, high) are equal: further bisection keeps the same set."""
    between_Nv = (scores_Nv >= low_N1) & (scores_Nv < high_N1)
    floor_N1 = scores_Nv.new_full((len(scores_Nv), 1), -math.inf)
    ends_2N = torch.stack(
        [
            torch.cat([torch.where(between_Nv, part_Nv, -math.inf), floor_N1], 1).amax(1)
            for part_Nv in (scores_Nv, -scores_Nv)
        ]
    )
    highest_N, minus_lowest_N = all_gather(ends_2N, group).amax(0)
    return bool(on_host((highest_N <= -minus_lowest_N).all()))


def _gumbel(seed: int, draw: int, positions_n: Tensor, ids_v: Tensor) -> Tensor:
    """Returns Gumbel noise [n, v] in float64, made from a hash (SplitMix64, Steele et al., 2014).

    The hash is of seed, draw, position and row.
    """
    state = _mix(_mix(_mix(torch.tensor(seed, device=ids_v.device)) + draw) + positions_n.unsqueeze(1))
    bits_nv = _shift(_mix(state + ids_v), 12)  # 52 bits: with 53, adding a half could round up to 1
    return bits_nv.double().add_(0.5).div_(2**52).log_().neg_().log_().neg_()


def _mix(x: Tensor) -> Tensor:
    x = x + _signed(0x9E3779B97F4A7C15)  # int64 wraps around, as SplitMix64 wants
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shifts to the right and fills with zeros; torch's own shift keeps the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


def _total(mine_N: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Returns the sum over the ranks, added in rank order."""
    return all_gather(mine_N, group).sum(0)
