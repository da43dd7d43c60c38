"""Registry of the hooks, in the order in which they are called."""

from collections.abc import Callable

from ..config.job import JobConfig
from . import ema, embedding, evaluation, guard, lens, log, profile, save, tasks, untie
from .base import Hook, Run

BUILDERS: tuple[Callable[[JobConfig, Run], Hook | None], ...] = (
    guard.build,  # first: the other hooks do not see a batch that it leaves out
    profile.build,  # before the next: a trace ends before the work of the others after its last step
    ema.build,  # before the evaluation, which measures it as well
    evaluation.build,
    tasks.build,
    untie.build,
    embedding.build,
    lens.build,
    log.build,  # after all hooks that add to the report of a step
    save.build,  # last: what was evaluated goes into the checkpoint
)


def build_hooks(config: JobConfig, run: Run) -> list[Hook]:
    """The hooks that the settings ask for."""
    return [hook for build in BUILDERS if (hook := build(config, run)) is not None]
