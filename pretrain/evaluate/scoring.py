"""Log-probabilities of given tokens, while no rank ever has a row of logits. Knows nothing of lm-eval."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..models.language_model import LanguageModel
from ..vocab.collectives import all_gather, on_host
from ..vocab.loss import vocab_parallel_linear_cross_entropy


class Interrupted(Exception):
    """Raised on all ranks if the run has to stop."""


@dataclass(frozen=True)
class Window:
    """A text, at most one token longer than the context; its last `scored` tokens are to be scored."""

    ids: list[int]
    scored: int


@dataclass
class Scorer:
    """Scores windows. They are split over all ranks of the process group, whatever share of the matrix a rank has."""

    model: LanguageModel
    context: int
    batch: int  # windows per rank at once
    done: Callable[[int], None] = lambda windows: None  # called after each batch, with their number
    must_stop: Callable[[], bool] = lambda: False  # asked before each batch; the same on all ranks
    cached: bool = True  # generate with a cache of keys and values

    @torch.no_grad()
    def scores(self, windows: Sequence[Window]) -> list[tuple[float, bool]]:
        """Returns per window the sum of the log-probabilities of its scored tokens, in nats, and whether each of them
        is the most likely one. All ranks pass the same windows and get all results.

        Collectives per batch: those of lookup, body and loss, and an all-gather of 2 numbers per window. Raises
        Interrupted if the run has to stop, and ValueError if a window does not fit the context.
        """
        for window in windows:
            if not 0 < window.scored < len(window.ids) <= self.context + 1:
                raise ValueError(
                    f"a request of {len(window.ids)} tokens, {window.scored} of them scored, must have at most"
                    f" model.context={self.context} tokens and one more, and one before the scored ones"
                )
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        order = sorted(range(len(windows)), key=lambda index: -len(windows[index].ids))
        results: list[tuple[float, bool]] = [(0.0, True)] * len(windows)
        for start in range(0, len(order), world * self.batch):
            if self.must_stop():
                raise Interrupted
            group = order[start : start + world * self.batch]
            shares = [[windows[index] for index in group[r::world]] for r in range(world)]
            mine_B2 = self._score(shares, rank)
            all_pB2 = on_host(all_gather(mine_B2, dist.group.WORLD if world > 1 else None))
            for r in range(world):
                for row, index in enumerate(group[r::world]):
                    total, wrong = all_pB2[r, row].tolist()
                    results[index] = (total, wrong == 0)
            self.done(len(group))
        return results

    def _score(self, shares: list[list[Window]], rank: int) -> Tensor:
        """Returns [B, 2] in float64: sum of log-probabilities, number of scored tokens that are not the most likely."""
        vocab, mine = self.model.vocab, shares[rank]
        rows, longest = len(shares[0]), max(len(window.ids) for share in shares for window in share) - 1
        device = vocab.weight.device
        tokens_BT = torch.zeros(rows, longest, dtype=torch.int64)
        at: list[int] = []
        targets: list[int] = []
        owners: list[int] = []
        for row, window in enumerate(mine):
            length = len(window.ids) - 1
            tokens_BT[row, :length] = torch.tensor(window.ids[:-1])
            at += range(row * longest + length - window.scored, row * longest + length)
            targets += window.ids[-window.scored :]
            owners += [row] * window.scored
        hidden_BTD = self.model.body(
            vocab.lookup(tokens_BT.to(device), max_tokens_per_rank=rows * longest)  # later tokens are not seen: causal
        )
        scored_ND = hidden_BTD.flatten(0, 1)[torch.tensor(at, dtype=torch.int64, device=device)]
        out = vocab_parallel_linear_cross_entropy(
            scored_ND.to(vocab.compute_dtype),
            vocab.output_weight,
            torch.tensor(targets, dtype=torch.int64, device=device),
            shard=vocab.shard,
            group=vocab.group,
            softcap=vocab.config.softcap,
            reduction="none",
            memory_mib=vocab.config.head_memory_mib,
            max_tokens_per_rank=max(sum(window.scored for window in share) for share in shares),
            kernels=vocab.kernels,
        )
        assert out.correct is not None  # metrics are on
        of_N = torch.tensor(owners, dtype=torch.int64, device=device)
        sums_B2 = torch.zeros(rows, 2, dtype=torch.float64, device=device)
        return sums_B2.index_add_(0, of_N, torch.stack([-out.loss.double(), (~out.correct).double()], 1))
