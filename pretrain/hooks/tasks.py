"""Tasks of lm-eval during training. Not part of evaluation.py, because lm-eval is optional."""

import sys
from typing import Any

from data_prep.errors import headline
from data_prep.special_tokens import SpecialTokens
from data_prep.tokenizer import Tokenizer

from ..config.engine import FSDP2Config
from ..config.job import JobConfig
from ..evaluate.scoring import Interrupted, Scorer
from ..evaluate.tasks import load_tasks
from .base import Hook, Run, StepReport, TrainerView

# Errors in the code or the data of a task, the same on all ranks. The training goes on.
MISTAKES = (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError, ValueError)


class TasksHook(Hook):
    """Measures of each task, as `task/TASK/METRIC`. Collectives: those of `Scorer`."""

    def __init__(self, config: JobConfig, run: Run, loaded: Any, tokenizer: Tokenizer) -> None:
        """loaded: of `load_tasks`."""
        self.config, self.context, self.batch = config.eval, config.model.context, config.train.micro_batch
        self.run, self.loaded, self.tokenizer, self.run_dir = run, loaded, tokenizer, config.run_dir
        self.cached = not (isinstance(config.engine, FSDP2Config) and config.engine.compile)  # would be compiled again

    def after_step(self, trainer: TrainerView, report: StepReport) -> None:
        step, every = trainer.state.step, self.config.tasks_every
        if step == trainer.loop.steps or (every and step % every == 0):
            report.scalars |= self.measure(trainer)

    def measure(self, trainer: TrainerView) -> dict[str, float]:
        """Runs the tasks. Empty if the ranks must stop early, or with a warning if a task has a mistake."""
        from ..evaluate.harness import evaluate, scalars

        done = 0

        def show(windows: int) -> None:
            nonlocal done
            done += windows
            if self.run.log is not None:
                self.run.log.console.busy(f"tasks, request {done:,}")

        scorer = Scorer(trainer.model, self.context, self.batch, show, trainer.must_stop, self.cached)
        special = SpecialTokens.of_run(self.run_dir)
        try:
            results = evaluate(self.loaded, scorer, self.tokenizer, special, self.config.tasks_limit)
        except Interrupted:
            return {}
        except MISTAKES as error:
            if self.run.log is not None:
                what = f"eval.tasks={','.join(self.config.tasks)} cannot be measured"
                print(f"warning: {what}: {headline(error)}", file=sys.stderr, flush=True)
            return {}
        return {f"task/{key}": value for key, value in scalars(results).items()}


def build(config: JobConfig, run: Run) -> TasksHook | None:
    """The hook, if there are tasks. Raises ValueError if a task cannot be loaded."""
    if not config.eval.tasks:
        return None
    assert run.data.tokenizer is not None  # see `check_job`
    loaded = load_tasks("eval.", config.eval.tasks, config.eval.tasks_path)
    return TasksHook(config, run, loaded, Tokenizer.load(run.data.tokenizer))
