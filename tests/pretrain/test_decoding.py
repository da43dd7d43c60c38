"""Ids drawn with a cache, in batches and on any number of ranks equal those of one dense forward per id, in float64."""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.decoding import Batch
from pretrain.families.gpt2 import GPT2Config
from pretrain.families.llama import LlamaConfig
from pretrain.models.cache import KeyValueCache
from pretrain.models.language_model import LanguageModel
from pretrain.vocab import VocabParallelEmbedding, VocabShard
from pretrain.vocab.sampling import sample
from tests.ranks import run_ranks

ROWS, CONTEXT, TOKENS, ENDED = 307, 16, 12, 7
PROMPTS = [[5], [7, 8, 9], list(range(40, 52)), list(range(100, 116)), [5]]  # the fourth fills the context
FAMILIES = {
    "gpt2": GPT2Config(layers=2, width=24, heads=3, context=CONTEXT),
    "llama": LlamaConfig(layers=2, width=24, heads=4, kv_heads=2, inner=40, context=CONTEXT),
}


@dataclass
class Settings:
    seed: int = 3
    temperature: float = 0.9
    top_k: int | None = 60
    top_p: float = 0.9


GREEDY = Settings(temperature=0.0)


def body_of(family: str) -> nn.Module:
    """A body in float64 whose random weights are large enough that ids depend on all earlier ones."""
    with torch.device("cpu"):
        body = FAMILIES[family].body().double()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in body.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = 0.1 * noise + ("norm" in name and "weight" in name) if parameter.dim() == 1 else 0.5 * noise
    return body


def model_of(family: str) -> LanguageModel:
    vocab = VocabParallelEmbedding.create(ROWS, 24, multiple=8, seed=1, std=1.0, dtype=torch.float64)
    return LanguageModel(vocab, body_of(family))


def drawn(rank: int, world: int, family: str, settings: Settings, cached: bool) -> list[list[int]]:
    batch = Batch(model_of(family), PROMPTS, context=CONTEXT, tokens=TOKENS, sampling=settings, cached=cached)
    while batch.live:
        pairs = batch.step()
        batch.end([index for index, _ in pairs if index == 0 and batch.draw == ENDED])
    return [ids[len(prompt) :] for ids, prompt in zip(batch.ids, PROMPTS, strict=True)]


def dense(family: str, prompt: list[int], tokens: int, settings: Settings) -> list[int]:
    """Draws ids one by one; each by a forward of the whole text."""
    model, ids = model_of(family), list(prompt)
    shard = VocabShard.of(0, 1, ROWS, 8)
    for draw in range(min(tokens, CONTEXT + 1 - len(prompt))):
        with torch.no_grad():
            hidden_BTD = model.body(model.vocab.weight[torch.tensor([ids])])
        (id,) = sample(
            hidden_BTD[:, -1],
            model.vocab.weight,
            shard=shard,
            seed=settings.seed,
            draw=draw,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
        ).tolist()
        ids.append(id)
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("settings", [GREEDY, Settings()], ids=["greedy", "sampled"])
def test_ids_are_those_of_a_forward_per_id(family, settings):
    assert not dist.is_initialized()
    limits = [ENDED, *[TOKENS] * 4]
    expected = [dense(family, prompt, tokens, settings) for prompt, tokens in zip(PROMPTS, limits, strict=True)]
    assert [len(ids) for ids in expected] == [ENDED, TOKENS, 5, 1, TOKENS]
    assert len({tuple(ids[:5]) for ids in expected}) == 4, "the prompts must differ, and equal prompts must not"
    assert expected[4][:ENDED] == expected[0]
    assert drawn(0, 1, family, settings, True) == expected
    assert drawn(0, 1, family, settings, False) == expected
    for world in (2, 4):
        assert run_ranks(world, drawn, family, settings, True) == [expected] * world


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_of_a_cache_match_a_whole_forward(family):
    body, generator = body_of(family), torch.Generator().manual_seed(2)
    hidden_BTD: Tensor = torch.randn(3, 10, 24, generator=generator, dtype=torch.float64)
    lengths, cache = [4, 7, 2], KeyValueCache(2, 3, 12, torch.device("cpu"))
    with torch.no_grad():
        whole_BTD = body(hidden_BTD)
        first_BTD = body(hidden_BTD[:, :7], cache=cache.whole(7))
        torch.testing.assert_close(first_BTD[1], whole_BTD[1, :7])
        cache.keep([2, 0])  # the second sequence has ended
        for more in range(3):
            at = [lengths[2] + more, lengths[0] + more]
            new = torch.stack([hidden_BTD[2, at[0]], hidden_BTD[0, at[1]]])[:, None]
            next_BTD = body(new, cache=cache.next(at))
            torch.testing.assert_close(next_BTD[:, 0], torch.stack([whole_BTD[2, at[0]], whole_BTD[0, at[1]]]))
