"""Moves matrices between the ranks that hold their parts and their owners; owners.py decides which, without tensors."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from .owners import Schedule


class Exchange:
    """Gathers the matrices of a round at their owners, and brings the results back. Each way one all-to-all per round.

    group: None: this rank is alone, and nothing moves. Parts are flat; `parts[index]` is this rank's part of a matrix.
    """

    def __init__(
        self, schedule: Schedule, group: dist.ProcessGroup | None, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.schedule, self.group, self.dtype, self.device = schedule, group, dtype, device
        self.rank = 0 if group is None else dist.get_rank(group)

    def gather(self, number: int, parts: dict[int, Tensor]) -> Callable[[], dict[int, Tensor]]:
        """Starts to gather round `number`. The result waits, and returns this rank's matrices [rows, columns]."""
        matrices, owned = self.schedule.matrices, self.schedule.rounds[number]
        mine, ranks = owned[self.rank], range(len(owned))

        def shaped(whole: dict[int, Tensor]) -> dict[int, Tensor]:
            return {i: flat.view(matrices[i].rows, matrices[i].columns) for i, flat in whole.items()}

        if self.group is None or self.schedule.replicated:
            return lambda: shaped({i: parts[i] for i in mine})
        arrive = self._swap(
            [[parts[i] for i in owned[to]] for to in ranks], [[matrices[i].held(of) for i in mine] for of in ranks]
        )

        def arrived() -> dict[int, Tensor]:
            return shaped({i: torch.cat(of) for i, of in zip(mine, zip(*arrive(), strict=True), strict=True)})

        return arrived

    def scatter(self, number: int, results: dict[int, Tensor]) -> Callable[[], dict[int, Tensor]]:
        """Starts to bring the results of round `number` back. The result waits, and returns this rank's parts."""
        matrices, owned = self.schedule.matrices, self.schedule.rounds[number]
        flat = {i: result.flatten() for i, result in results.items()}
        if self.group is None:
            return lambda: flat
        ranks = range(len(owned))

        def part(i: int, rank: int) -> Tensor:
            start, stop = matrices[i].span(rank)
            return flat[i][start:stop]

        arrive = self._swap(
            [[part(i, to) for i in owned[self.rank]] for to in ranks],
            [[matrices[i].held(self.rank) for i in owned[of]] for of in ranks],
        )
        return lambda: {
            i: got for of, gots in zip(owned, arrive(), strict=True) for i, got in zip(of, gots, strict=True)
        }

    def _swap(self, parts: list[list[Tensor]], sizes: list[list[int]]) -> Callable[[], list[list[Tensor]]]:
        """Starts one all-to-all. parts: for each rank; sizes: of those from each rank. The result waits for them."""
        send = [sum(part.numel() for part in to) for to in parts]
        receive = [sum(lengths) for lengths in sizes]
        given = torch.cat([part for of in parts for part in of] or [self._empty(0)])
        out = self._empty(sum(receive))
        work = dist.all_to_all_single(out, given, receive, send, group=self.group, async_op=True)

        def arrived() -> list[list[Tensor]]:
            work.wait()
            return [list(of.split(lengths)) for of, lengths in zip(out.split(receive), sizes, strict=True)]

        return arrived

    def _empty(self, numbers: int) -> Tensor:
        return torch.empty(numbers, dtype=self.dtype, device=self.device)
