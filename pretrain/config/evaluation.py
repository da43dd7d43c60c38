"""Settings of the evaluation: how often, on how much text and on which tasks. Group eval, and the command."""

from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from .ema import check_choice


@dataclass
class EvalConfig:
    """Validation loss and bits per byte on the validation splits, and tasks of lm-eval."""

    every: int = 250  # steps between evaluations; 0: only after the last step
    max_windows: int = 0  # windows of each validation split to score; 0: all
    tasks: list[str] = field(default_factory=list)  # names of lm-eval tasks to run during training
    tasks_path: str = ""  # folder of their YAML files; empty: the tasks that lm-eval brings, which download data
    tasks_every: int = 0  # steps between runs of the tasks; 0: only after the last step
    tasks_limit: int | None = None  # examples of each task; null: all

    def __post_init__(self) -> None:
        for key in ("every", "max_windows", "tasks_every"):
            if getattr(self, key) < 0:
                raise ValueError(f"eval.{key}={getattr(self, key)} must not be negative")
        _check_limit("eval.tasks_limit", self.tasks_limit)


@dataclass
class EvaluateConfig:
    """Settings of `python -m pretrain.evaluate`."""

    run: str = ""  # folder of the run
    tasks: list[str] = field(default_factory=list)  # names of lm-eval tasks, groups or tags: [a,b]
    tasks_path: str = ""  # folder of their YAML files; empty: the tasks that lm-eval brings, which download data
    step: int | None = None  # step of the checkpoint; null: the newest
    weights: str = "last"  # last: the weights of the step; ema: their running average, see ema.decay
    limit: int | None = None  # examples of each task; null: all
    batch: int = 8  # requests per rank at once
    out: str = ""  # file for the results, JSON; empty: RUN/evaluations/STEP.json

    def __post_init__(self) -> None:
        if not self.run:
            raise ValueError("run is missing: name the folder of a run, such as run=runs/a")
        check_choice(self.weights)
        if not any(self.tasks):
            raise ValueError("tasks is missing: name tasks of lm-eval, such as tasks=[a,b]")
        if self.batch < 1:
            raise ValueError(f"batch={self.batch} must be at least 1")
        _check_limit("limit", self.limit)


def check_tasks(prefix: str, tasks: list[str], folder: str) -> None:
    """Raises ValueError if lm-eval is missing, or the folder of the tasks. prefix: of the keys. Does not load tasks."""
    if tasks and find_spec("lm_eval") is None:
        raise ValueError(f"{prefix}tasks={','.join(tasks)} need lm-eval: pip install 'rowshard[eval]'")
    if tasks and folder and not Path(folder).is_dir():
        raise ValueError(f"{prefix}tasks_path={folder} must be a folder with YAML files of tasks")


def _check_limit(key: str, limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ValueError(f"{key}={limit} must be at least 1 (null: all examples)")
