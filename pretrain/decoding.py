"""Continues several prompts at once. Not part of generation.py, which prints: evaluation generates, too."""

import inspect
from collections.abc import Collection, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .models.cache import KeyValueCache
from .models.language_model import LanguageModel
from .vocab.collectives import all_gather
from .vocab.lookup import plan_lookup
from .vocab.sampling import sample

KEPT_BYTES = 2**28  # of rows in float64, which `sample` otherwise converts for each id


class Sampling(Protocol):
    """Settings of `sample`, such as a GenerateConfig."""

    seed: int
    temperature: float
    top_k: int | None
    top_p: float


class Batch:
    """Prompts that are continued together, one id per call of `step`.

    A prompt's ids do not depend on the other prompts, but for rounding: all prompts get the same noise. The prompts are
    split over the ranks of the matrix's group; all ranks of the process group make the same calls.

    A text ends at the model's context: an id is drawn only if all ids before it fit in.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        *,
        context: int,
        tokens: int,
        sampling: Sampling,
        cached: bool = True,
    ) -> None:
        """prompts: 1 to `context` ids each. tokens: largest number of ids to draw. cached: keep keys and values, if the
        body can.
        """
        self.model, self.context, self.tokens, self.sampling = model, context, tokens, sampling
        self.group = model.vocab.group
        self.ranks = dist.get_world_size(self.group) if self.group else 1
        self.rank = dist.get_rank(self.group) if self.group else 0
        self.device = model.vocab.weight.device
        rows_vD = model.vocab.output_weight.detach()
        self.rows_vD = rows_vD.double().T.contiguous().T if 8 * rows_vD.numel() <= KEPT_BYTES else rows_vD
        self.ids = [list(prompt) for prompt in prompts]
        assert all(1 <= len(ids) <= context for ids in self.ids)
        self.live, self.draw = list(range(len(prompts))), 0
        self.mine = [index for index in self.live if self._owner(index) == self.rank]  # the cache's rows
        self.cache: KeyValueCache | None = None
        if cached and "cache" in inspect.signature(getattr(model.body, "forward", model.body)).parameters:
            slots = min(context, max(map(len, self.ids)) + tokens)
            self.cache = KeyValueCache(len(model.body.blocks), len(self.mine), slots, self.device)  # type: ignore[attr-defined]

    @torch.no_grad()
    def step(self) -> list[tuple[int, int]]:
        """Draws one id for each live prompt. Returns pairs of the prompt's index and the id. Prompts with `tokens` ids
        drawn, or whose ids no longer fit in the context, are then no longer live.

        Collectives: one of the lookup, which needs no ids of other ranks, a gather of one hidden state per prompt, and
        those of `sample`.
        """
        vocab = self.model.vocab
        drawn = sample(
            self._read(),
            self.rows_vD,
            shard=vocab.shard,
            group=vocab.group,
            seed=self.sampling.seed,
            draw=self.draw,
            temperature=self.sampling.temperature,
            top_k=self.sampling.top_k,
            top_p=self.sampling.top_p,
            softcap=vocab.config.softcap,
            same_noise=True,
        ).tolist()
        self.draw += 1
        pairs = list(zip(self.live, drawn, strict=True))
        for index, id in pairs:
            self.ids[index].append(id)
        self.end([index for index in self.live if self.draw == self.tokens or self.is_full(index)])
        return pairs

    def is_full(self, index: int) -> bool:
        """True if the prompt's ids no longer fit in the context."""
        return len(self.ids[index]) > self.context

    def end(self, indices: Collection[int]) -> None:
        """Draws no more ids for these prompts, and frees their part of the cache. Local."""
        self.live = [index for index in self.live if index not in indices]
        kept = [row for row, index in enumerate(self.mine) if index not in indices]
        if len(kept) < len(self.mine):
            self.mine = [self.mine[row] for row in kept]
            if self.cache is not None:
                self.cache.keep(kept)

    def _owner(self, index: int) -> int:
        return index % self.ranks

    def _read(self) -> Tensor:
        """Returns the last hidden state of each live prompt, [N, D]. Reads only the newest id if the rest is cached."""
        newest = self.draw > 0 and self.cache is not None
        texts = {index: self.ids[index][-1:] if newest else self.ids[index] for index in self.live}
        longest = max(map(len, texts.values()))
        own_p = [[index for index in self.live if self._owner(index) == rank] for rank in range(self.ranks)]
        # all ranks run the body: an engine may gather its weights
        texts_p = [[texts[index] for index in own] or [[0]] for own in own_p]
        ids_pBT = [torch.tensor([text + [0] * (longest - len(text)) for text in own]) for own in texts_p]
        vocab, own_BT = self.model.vocab, ids_pBT[self.rank].to(self.device)
        plan = plan_lookup([ids_BT.flatten() for ids_BT in ids_pBT], vocab.shard, vocab.compute_dtype)
        hidden_BTD = vocab.lookup(own_BT, plan.to(self.device))
        if self.cache is None or not self.mine:
            hidden_BTD = self.model.body(hidden_BTD)
        else:
            new = self.cache.next([len(self.ids[i]) - 1 for i in self.mine]) if newest else self.cache.whole(longest)
            hidden_BTD = self.model.body(hidden_BTD, cache=new)
        if longest > 1:
            last_BD = torch.stack([hidden_BTD[row, len(text) - 1] for row, text in enumerate(texts_p[self.rank])])
        else:
            last_BD = hidden_BTD[:, 0]
        most = max(map(len, own_p))
        gathered_MD = all_gather(F.pad(last_BD, (0, 0, 0, most - len(last_BD))), self.group).flatten(0, 1)
        return gathered_MD[[self._owner(i) * most + own_p[self._owner(i)].index(i) for i in self.live]]
