"""Finds and loads tasks of lm-eval. Not part of harness.py, because the launcher checks their names without torch."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import chdir, contextmanager, nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from data_prep.errors import headline


def check_names(prefix: str, tasks: Sequence[str], folder: str) -> Any:
    """Returns lm-eval's TaskManager for the YAML files in `folder`, or for lm-eval's own tasks if `folder` is "".

    prefix: of the keys in messages. Raises ValueError if a name in `tasks` is not a task.
    """
    from lm_eval.tasks import TaskManager

    with quiet():
        manager = TaskManager(
            include_path=str(Path(folder).absolute()) if folder else None, include_defaults=not folder
        )
    for name in tasks:
        if name not in manager.all_tasks:
            there = f"; {folder} has {', '.join(manager.all_tasks) or 'none'}" if folder else ""
            raise ValueError(f"{prefix}tasks={name} must be the name of a task, a group or a tag{there}")
    return manager


def load_tasks(prefix: str, tasks: Sequence[str], folder: str) -> Any:
    """Loads tasks by name. Those that lm-eval brings download their data.

    Paths of data in the files are relative to the folder. Raises ValueError as `check_names` does, and if a task has an
    error.
    """
    manager = check_names(prefix, tasks, folder)
    import datasets.config

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # else it reports each file that it opens to a server, also ours
    with quiet(), chdir(folder) if folder else nullcontext():
        try:
            loaded = manager.load(list(tasks))
        except Exception as error:  # lm-eval and datasets raise many kinds
            raise ValueError(f"{prefix}tasks={','.join(tasks)} cannot be loaded: {headline(error)}") from error
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=0)
    return loaded


@contextmanager
def quiet() -> Iterator[None]:
    """Hides the log and the bars of lm-eval and datasets; `evaluate` shows ours within it."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        logger.setLevel(level)
