"""Measures how fast text is generated: ids drawn with a cache and in batches, against one forward of the whole text per
id and prompt. Both run in turns.

    python tests/benchmarks/generating.py --run runs/demo [--tokens 512] [--batch 16] [--repeats 3]

If --tokens do not fit in the model's context, its positions are also repeated until they do. Prints Markdown. Seconds
are CPU seconds: generating waits for nothing, and other programs change them less.
"""

import argparse
import os
import sys
import time
from pathlib import Path
from statistics import median

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from pretrain.checkpoint import checkpoint_of
from pretrain.config.generation import GenerateConfig
from pretrain.decoding import Batch
from pretrain.generation import load_model
from pretrain.models.language_model import LanguageModel
from pretrain.vocab.sampling import sample
from tests.benchmarks.measure import markdown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    model, own = load_model(checkpoint_of(Path(options.run), None), torch.device("cpu"))
    prompts = [[1, 2 + index] for index in range(options.batch)]
    rows = []
    for context in sorted({own, max(own, options.tokens + 1)}):
        with_positions(model, context)
        tokens = min(options.tokens, context - 1)  # a prompt has two ids; the last one drawn is not read
        settings = GenerateConfig(run=options.run, seed=1, tokens=tokens)
        seconds, ids = measured(model, prompts, context, settings, options.repeats)
        for number in (1, options.batch):
            each = seconds[number] / number
            same = sum(a == b for a, b in zip(ids[0][0], ids[number][0], strict=True)) - len(prompts[0])
            rates = (f"{tokens / time_of_one:.0f}" for time_of_one in (seconds[0], each))
            rows.append([str(context), str(tokens), str(number), *rates, f"{seconds[0] / each:.1f}", str(same)])
    head = ["context", "tokens", "prompts", "old, tokens/s", "new, tokens/s", "ratio", "same tokens"]
    print(f"\n{sum(p.numel() for p in model.body.parameters()) / 1e6:.1f} M parameters in the body,", end=" ")
    print(f"{model.vocab.shard.vocab_size:,} rows; {torch.get_num_threads()} thread; temperature 0.8, top_p 0.95\n")
    print(markdown(head, rows))


def measured(
    model: LanguageModel, prompts: list[list[int]], context: int, settings: GenerateConfig, repeats: int
) -> tuple[dict[int, float], dict[int, list[list[int]]]]:
    """Returns median CPU seconds, and the texts, by the number of prompts at once. 0: the old way, one prompt."""
    ways = {0: (forward_per_id, prompts[:1]), 1: (batched, prompts[:1]), len(prompts): (batched, prompts)}
    seconds: dict[int, list[float]] = {number: [] for number in ways}
    ids = {}
    for _ in range(repeats):
        for number, (way, given) in ways.items():
            start = time.process_time()
            ids[number] = way(model, given, context, settings)
            seconds[number].append(time.process_time() - start)
    return {number: median(times) for number, times in seconds.items()}, ids


def with_positions(model: LanguageModel, context: int) -> None:
    """Gives a GPT-2 body as many positions, the own ones again and again; other families need none."""
    if hasattr(model.body, "positions"):
        own_PD = model.body.positions.detach()
        model.body.positions = torch.nn.Parameter(own_PD.repeat(-(-context // len(own_PD)), 1)[:context])


def batched(model: LanguageModel, prompts: list[list[int]], context: int, settings: GenerateConfig) -> list[list[int]]:
    batch = Batch(model, prompts, context=context, tokens=settings.tokens, sampling=settings)
    while batch.live:
        batch.step()
    return batch.ids


def forward_per_id(
    model: LanguageModel, prompts: list[list[int]], context: int, settings: GenerateConfig
) -> list[list[int]]:
    """Reads the whole text for each id, one prompt after the other."""
    vocab, texts = model.vocab, [list(prompt) for prompt in prompts]
    for ids in texts:
        for draw in range(settings.tokens):
            seen = torch.tensor([ids])
            with torch.no_grad():
                hidden_BTD = model.body(vocab.lookup(seen))
            options = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
            ids += sample(
                hidden_BTD[:, -1],
                vocab.output_weight,
                shard=vocab.shard,
                seed=settings.seed,
                draw=draw,
                softcap=vocab.config.softcap,
                **options,
            ).tolist()
    return texts


if __name__ == "__main__":
    main()
