"""Loads a checkpoint and runs tasks on it. Not part of evaluate.py, the command, because it needs torch."""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_prep.progress import Meter
from data_prep.special_tokens import SpecialTokens
from data_prep.token_file import TOKENIZER_FOLDER
from data_prep.tokenizer import Tokenizer

from ..checkpoint import step_of
from ..config.evaluation import EvaluateConfig
from ..evaluate.harness import evaluate, scalars
from ..evaluate.scoring import Scorer
from ..evaluate.tasks import load_tasks
from ..generation import load_model
from ..mesh import ranks_or_alone


def results_of(settings: EvaluateConfig, folder: Path) -> tuple[dict[str, float], dict[str, Any]] | None:
    """Returns the measures and all results on the first rank, elsewhere None. Collective."""
    run = Path(settings.run)
    with ranks_or_alone() as device:
        first = not dist.is_initialized() or dist.get_rank() == 0
        tokenizer = Tokenizer.load(run / TOKENIZER_FOLDER)
        loaded = load_tasks("", settings.tasks, settings.tasks_path)
        model, context = load_model(folder, device, settings.weights)
        with Meter("evaluate", None) as meter:
            done = 0

            def show(windows: int) -> None:
                nonlocal done
                done += windows
                if first:
                    meter.show(done, [f"{done:,} requests"])

            scorer = Scorer(model, context, settings.batch, show)
            results = evaluate(loaded, scorer, tokenizer, SpecialTokens.of_run(run), settings.limit)
        if not first:
            return None
        return scalars(results), {"step": step_of(folder), "run": settings.run} | results
