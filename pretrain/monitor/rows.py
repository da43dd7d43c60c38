"""Measures of the rows of a matrix, and of the gradients of its two uses.

All measures are exact: sums over rows are all-reduced over the vocab group, and no row leaves its rank.
"""

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..vocab import VocabShard
from ..vocab.collectives import on_host
from .spectrum import isotropy

BINS = ("never", "0-1ppm", "1-10ppm", "10-100ppm", "100-1000ppm", "1000ppm-up")  # uses of a row in a million
EDGES = (1.0, 10.0, 100.0, 1000.0)
SMALL = 0.1  # of the mean norm: padding rows are zero, and gradients hardly move a row near zero
MAX_LISTED_ROWS = 50  # ids of each kind
BLOCK = 2**20  # numbers of a matrix in one piece of work


def blocks(rows: int, width: int) -> Iterator[slice]:
    """Yields slices of rows of at most `BLOCK` numbers each, so that work on one slice needs little memory."""
    height = max(1, BLOCK // width)
    return (slice(start, min(start + height, rows)) for start in range(0, rows, height))


class Rows:
    """The rows of the vocabulary and their counts, split over `group`. All measures are equal on all its ranks."""

    def __init__(self, shard: VocabShard, group: dist.ProcessGroup | None, counts_v2: Tensor) -> None:
        self.shard, self.group = shard, group
        self.valid = shard.valid_rows
        self.counts_v2 = counts_v2[: self.valid]
        self.uses_v = self.counts_v2.sum(1)
        frequency_v = self.uses_v / self._sum(self.uses_v.sum()).clamp_min(1) * 1e6
        edges = torch.tensor(EDGES, dtype=torch.float64, device=counts_v2.device)
        self.bin_v = torch.where(self.uses_v > 0, 1 + torch.bucketize(frequency_v, edges, right=True), 0)

    def gradients(self, uses_v3: Tensor) -> dict[str, float]:
        """Norms grad_input and grad_output; grad_input_share, the input's part of their sum; grad_cosine between the
        two, all numbers of the rows as one vector. For all rows, and for each bin that has rows.
        """
        bins_b3 = self._host_sum(self._by_bin(uses_v3[: self.valid]))
        scalars: dict[str, float] = {}
        for suffix, (enter, leave, product) in self._named(bins_b3):
            norms = math.sqrt(enter), math.sqrt(leave)
            scalars[f"grad_input{suffix}"], scalars[f"grad_output{suffix}"] = norms
            if sum(norms) > 0:
                scalars[f"grad_input_share{suffix}"] = norms[0] / sum(norms)
            if min(norms) > 0:
                scalars[f"grad_cosine{suffix}"] = product / norms[0] / norms[1]
        return scalars

    def unseen(self) -> dict[str, float]:
        """Counts the rows that were never an input, never a target, and the rows in each bin."""
        never = self._host_sum((self.counts_v2 == 0).sum(0).double()).tolist()
        bins = self._host_sum(self._by_bin(torch.ones_like(self.counts_v2[:, :1]))).squeeze(1).tolist()
        scalars = dict(zip(("rows_never_input", "rows_never_target"), never, strict=True))
        return scalars | {f"rows_of_bin/{name}": count for name, count in zip(BINS, bins, strict=True)}

    def of_matrix(self, weight_vD: Tensor) -> tuple[dict[str, float], dict[str, list[int]]]:
        """Measures one matrix: numbers, and the lowest ids of rows that are damaged, small, or look unseen.

        norm: mean norm of the rows, also by bin. norm_by_count: its correlation with the log of the count, over rows
        that were used. Shape: see `isotropy`. damaged: rows with a number that is not finite, or with only zeros; no
        other measure includes them. small: below a tenth of the mean norm, near the padding rows, which are zero.
        like_unseen: rows that were used, but are no farther from the centroid of the unused rows than the farthest of
        these (glitch candidates: Land & Bartolo, arXiv:2405.05417).
        """
        weight_vD = weight_vD.detach()[: self.valid]
        D, device = weight_vD.shape[1], weight_vD.device
        norm_v = torch.empty(self.valid, dtype=torch.float64, device=device)
        gram_DD = torch.zeros(D, D, dtype=torch.float64, device=device)
        sums_3D = torch.zeros(3, D, dtype=torch.float64, device=device)  # rows, their directions, rows never seen
        for part in blocks(self.valid, D):
            rows = weight_vD[part].double()
            norm_v[part] = rows.norm(dim=1)
            norm = norm_v[part].unsqueeze(1)
            good = norm.isfinite() & (norm > 0)
            rows = torch.where(good, rows, 0.0)
            gram_DD.addmm_(rows.T, rows)
            directions = torch.where(good, rows / norm, 0.0)
            unseen = torch.where(self.bin_v[part].unsqueeze(1) == 0, rows, 0.0)
            sums_3D += torch.stack([rows.sum(0), directions.sum(0), unseen.sum(0)])
        good_v = norm_v.isfinite() & (norm_v > 0)
        norm_v = torch.where(good_v, norm_v, 0.0)
        gram_DD, sums_3D = self._sum(gram_DD), self._sum(sums_3D)
        bins_b2 = self._host_sum(self._by_bin(torch.stack([good_v.double(), norm_v], dim=1)))
        n, total = bins_b2.sum(0).tolist()

        scalars = {f"norm{suffix}": total / n for suffix, (n, total) in self._named(bins_b2) if n}
        scalars |= self._correlation(good_v & (self.uses_v > 0), norm_v)
        scalars |= isotropy(gram_DD, sums_3D[0], sums_3D[1], n)
        marked = {"damaged": ~good_v, "small": good_v & (norm_v < SMALL * total / max(n, 1))}
        if bins_b2[0, 0] > 0:
            marked["like_unseen"] = self._like_unseen(weight_vD, good_v, sums_3D[2] / bins_b2[0, 0])
        ids = {}
        for name, marked_v in marked.items():
            scalars[name], ids[name] = self._listed(marked_v)
        return scalars, ids

    def _like_unseen(self, weight_vD: Tensor, good_v: Tensor, centroid_D: Tensor) -> Tensor:
        distance_v = torch.empty(self.valid, dtype=torch.float64, device=weight_vD.device)
        for part in blocks(self.valid, weight_vD.shape[1]):
            distance_v[part] = (weight_vD[part].double() - centroid_D).norm(dim=1)
        unseen_v = good_v & (self.bin_v == 0)
        farthest = torch.where(unseen_v, distance_v, 0.0).amax() if self.valid else distance_v.new_zeros(())
        if self.group is not None:
            dist.all_reduce(farthest, dist.ReduceOp.MAX, group=self.group)
        return good_v & (self.bin_v > 0) & (distance_v <= farthest)

    def _correlation(self, counted_v: Tensor, norm_v: Tensor) -> dict[str, float]:
        """Pearson's correlation of norm and log count."""
        x_v = torch.where(counted_v, self.uses_v, 1.0).log()
        y_v = torch.where(counted_v, norm_v, 0.0)
        n, x, y = self._host_sum(torch.stack([counted_v.double().sum(), x_v.sum(), y_v.sum()])).tolist()
        if n < 2:
            return {}
        x_v, y_v = (torch.where(counted_v, values_v - mean / n, 0.0) for values_v, mean in ((x_v, x), (y_v, y)))
        xx, yy, xy = self._host_sum(torch.stack([(x_v * x_v).sum(), (y_v * y_v).sum(), (x_v * y_v).sum()])).tolist()
        return {"norm_by_count": xy / math.sqrt(xx * yy)} if xx > 0 and yy > 0 else {}

    def _listed(self, marked_v: Tensor) -> tuple[float, list[int]]:
        """Returns how many rows are marked, and the lowest of their ids."""
        mine = on_host(marked_v).nonzero().squeeze(1)[:MAX_LISTED_ROWS] + self.shard.start
        padded = F.pad(mine, (0, MAX_LISTED_ROWS - len(mine)), value=-1).to(marked_v.device)
        found = [padded]
        if self.group is not None:
            found = [torch.empty_like(padded) for _ in range(self.shard.world)]
            dist.all_gather(found, padded, group=self.group)
        ids = on_host(torch.cat(found))
        return float(self._host_sum(marked_v.sum().double())), ids[ids >= 0][:MAX_LISTED_ROWS].tolist()

    def _by_bin(self, values_vk: Tensor) -> Tensor:
        """Sums this rank's values by bin, [bins, k]."""
        return values_vk.new_zeros(len(BINS), values_vk.shape[1]).index_add_(0, self.bin_v, values_vk)

    def _named(self, bins_bk: Tensor) -> list[tuple[str, list[float]]]:
        """Returns the sums over all rows, then of each bin that has any."""
        of_bins = [(f"/{name}", sums) for name, sums in zip(BINS, bins_bk.tolist(), strict=True) if any(sums)]
        return [("", bins_bk.sum(0).tolist()), *of_bins]

    def _sum(self, mine: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(mine, group=self.group)
        return mine

    def _host_sum(self, mine: Tensor) -> Tensor:
        return on_host(self._sum(mine))
