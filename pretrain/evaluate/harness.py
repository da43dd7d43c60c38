"""Runs tasks of lm-eval (EleutherAI) on our model. Only it and tasks.py import lm-eval, which is optional."""

import sys
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from typing import Any

from data_prep.special_tokens import SpecialTokens
from data_prep.tokenizer import Tokenizer

from ..decoding import Batch
from .scoring import Interrupted, Scorer, Window
from .tasks import quiet

GENERATED = 256  # tokens, if a task does not say how many
STEPS_BETWEEN_CHECKS = 16  # of a generation, between two looks at whether the run has to stop


def evaluate(loaded: Any, scorer: Scorer, tokenizer: Tokenizer, special: SpecialTokens, limit: int | None) -> dict:
    """Returns lm-eval's results: `results` by task and metric, `n-samples`, `configs`. Collective: all ranks call it,
    and get the same. limit: examples per task; None: all.
    """
    from lm_eval.evaluator import evaluate as run

    for task in loaded["tasks"].values():
        task._instances = None  # of an earlier evaluation
    model = _adapter(scorer, tokenizer, special)
    with quiet():
        return dict(run(model, loaded, limit=limit, bootstrap_iters=0, log_samples=False) or {})


def scalars(results: dict) -> dict[str, float]:
    """Returns the measures of all tasks and groups, as `TASK/METRIC`; with a filter, as `TASK/METRIC,FILTER`."""
    found = {}
    for task, measures in results["results"].items():
        for key, value in measures.items():
            if isinstance(value, float | int) and "_stderr" not in key and "," in key:
                found[f"{task}/{key.removesuffix(',none')}"] = float(value)
    return found


@dataclass
class _Sampling:
    seed: int
    temperature: float
    top_k: int | None
    top_p: float


def _adapter(scorer: Scorer, tokenizer: Tokenizer, special: SpecialTokens) -> Any:
    """Returns our model as lm-eval's TemplateLM. It appears to lm-eval as one process, and uses all ranks itself."""
    from lm_eval.api.model import TemplateLM

    spec, shown = tokenizer.spec, sys.__stderr__ if sys.stderr is None else sys.stderr

    class Rowshard(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            return spec.end_of_document

        @property
        def prefix_token_id(self) -> int:
            return special.begin(spec)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **unused: Any) -> list[int]:
            begin = [special.begin(spec)] if special.adds_bos and add_special_tokens is not False else []
            return [*begin, *tokenizer.encode(string).tolist()]

        def _loglikelihood_tokens(self, requests: Any, **unused: Any) -> list[tuple[float, bool]]:
            with redirect_stderr(shown):
                return _scores(scorer, [(given or [self.prefix_token_id], asked) for _, given, asked in requests])

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            texts = [([self.prefix_token_id], self.tok_encode(request.args[0])) for request in requests]
            with redirect_stderr(shown):
                return [total for total, _ in _scores(scorer, texts)]

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            with redirect_stderr(shown):
                return _generated(scorer, tokenizer, special, [request.args for request in requests], self.tok_encode)

    return Rowshard()


def _scores(scorer: Scorer, requests: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """Scores the second part of each request, after the first."""
    parts = [list(windows_of(given, asked, scorer.context)) for given, asked in requests]
    scores = iter(scorer.scores([window for windows in parts for window in windows]))
    results = []
    for windows in parts:
        found = [next(scores) for _ in windows]
        results.append((sum(total for total, _ in found), all(greedy for _, greedy in found)))
    return results


def windows_of(given: list[int], asked: list[int], context: int) -> Iterator[Window]:
    """Yields windows in which each id of `asked` is scored once, after as much text as the context allows.

    `given` has at least one id. Up to `context` ids of `asked` are one window, the end of the text, as in lm-eval's
    models; more are several windows by its rule for perplexity.
    """
    text = given + asked
    for start in range(0, len(asked), context):
        stop = min(start + context, len(asked))
        end = len(given) + stop
        yield Window(text[max(0, end - context - 1) : end], stop - start)


def _generated(
    scorer: Scorer, tokenizer: Tokenizer, special: SpecialTokens, requests: list[Any], encode: Any
) -> list[str]:
    """Continues each context up to the first of its `until`, which is left out."""
    texts = [""] * len(requests)
    alike: dict[str, list[int]] = {}
    for index, (_, options) in enumerate(requests):
        alike.setdefault(repr(sorted(options.items(), key=str)), []).append(index)
    for indices in alike.values():
        options = requests[indices[0]][1]
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else [word for word in until if word]
        for start in range(0, len(indices), scorer.batch):
            part = indices[start : start + scorer.batch]
            contexts = [encode(requests[index][0]) or [special.begin(tokenizer.spec)] for index in part]
            made = _continued(scorer, tokenizer, special.stops(tokenizer.spec), contexts, options, until)
            for index, text in zip(part, made, strict=True):
                texts[index] = text
            scorer.done(len(part))
    return texts


def _continued(
    scorer: Scorer, tokenizer: Tokenizer, stops: set[int], contexts: list[list[int]], options: Any, until: list[str]
) -> list[str]:
    tokens = int(options.get("max_gen_toks", GENERATED))
    sampled = bool(options.get("do_sample", False)) and float(options.get("temperature", 1.0)) > 0
    sampling = _Sampling(
        seed=0,
        temperature=float(options.get("temperature", 1.0)) if sampled else 0.0,
        top_k=options.get("top_k") or None,
        top_p=float(options.get("top_p", 1.0)),
    )
    kept = max(1, scorer.context - tokens)
    prompts = [ids[-kept:] for ids in contexts]
    batch = Batch(scorer.model, prompts, context=scorer.context, tokens=tokens, sampling=sampling, cached=scorer.cached)
    drawn: list[list[int]] = [[] for _ in prompts]
    while batch.live:
        if batch.draw % STEPS_BETWEEN_CHECKS == 0 and scorer.must_stop():
            raise Interrupted
        ended = []
        for index, id in batch.step():
            if id in stops:
                ended.append(index)
                continue
            drawn[index].append(id)
            if any(word in _text(tokenizer, drawn[index]) for word in until):
                ended.append(index)
        batch.end(ended)
    texts = [_text(tokenizer, ids) for ids in drawn]
    return [min((text.split(word)[0] for word in until), key=len, default=text) for text in texts]


def _text(tokenizer: Tokenizer, ids: list[int]) -> str:
    known = [id for id in ids if id < tokenizer.vocab_size]  # vocab.size may be larger
    return tokenizer.decode(known)
