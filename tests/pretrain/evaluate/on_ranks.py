"""Functions of the ranks in test_evaluate.py, in a module of their own: a rank imports it, but not transformers."""

from pathlib import Path

import torch

from data_prep.special_tokens import SpecialTokens
from data_prep.tokenizer import Tokenizer
from pretrain.checkpoint import checkpoint_of
from pretrain.evaluate.harness import evaluate, scalars
from pretrain.evaluate.scoring import Scorer, Window
from pretrain.evaluate.tasks import load_tasks
from pretrain.generation import load_model

TASKS = str(Path(__file__).parent / "tasks")
NAMES = ["facts", "stories", "copies"]
WINDOWS = [Window([5, 6, 7, 8], 2), Window(list(range(40, 57)), 16), Window([9, 250], 1)]
WINDOWS += [Window([(7 * k + i) % 250 for i in range(4 + k)], 1 + k % 3) for k in range(12)]


def scored(rank: int, world: int, run: Path) -> list[tuple[float, bool]]:
    model, context = load_model(checkpoint_of(run, None), torch.device("cpu"))
    return Scorer(model, context, batch=2).scores(WINDOWS)


def measured(rank: int, world: int, run: Path) -> dict[str, float]:
    model, context = load_model(checkpoint_of(run, None), torch.device("cpu"))
    tokenizer = Tokenizer.load(run / "tokenizer")
    scorer = Scorer(model, context, batch=2)
    return scalars(evaluate(load_tasks("", NAMES, TASKS), scorer, tokenizer, SpecialTokens.of_run(run), None))
