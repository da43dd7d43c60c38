"""Runs benchmarks on a checkpoint: `python -m pretrain.evaluate --help`.

One process holds the whole matrix. Under torchrun its rows are split over the ranks, and so are the requests.
"""

import json
from pathlib import Path

from data_prep import terminal
from data_prep.arguments import defaults, settings_of
from data_prep.command import arguments_or, one_line
from data_prep.describe import columns
from data_prep.durable import check_file, durable

from ..checkpoint import CheckpointError, check_weights, checkpoint_of, read_manifest
from ..config.evaluation import EvaluateConfig, check_tasks
from ..exits import leave

HELP = """Runs tasks of lm-eval on a checkpoint. Needs lm-eval: pip install 'rowshard[eval]'.

  python -m pretrain.evaluate run=runs/a tasks=[facts,stories] tasks_path=tasks       tasks in YAML files of a folder
  python -m pretrain.evaluate run=runs/a tasks=[arc_easy] limit=500                   a task that lm-eval brings
  torchrun --nproc-per-node 2 -m pretrain.evaluate run=runs/a tasks=[arc_easy]        the matrix split over two ranks

Prints a table, and writes lm-eval's results as JSON. Paths of data in the YAML files are relative to tasks_path.

Settings, and their defaults:
"""


def main() -> None:
    """Runs the command. Exits with 0, or with 2 and one line if a setting or a task is wrong."""
    with one_line(CheckpointError):
        arguments = arguments_or(HELP + defaults(EvaluateConfig))
        settings = settings_of(EvaluateConfig, arguments)
        folder = checkpoint_of(Path(settings.run), settings.step)  # a mistake is reported before torch is imported
        check_weights(folder, read_manifest(folder), settings.weights)
        check_tasks("", settings.tasks, settings.tasks_path)
        name = folder.name if settings.weights == "last" else f"{folder.name}-{settings.weights}"
        out = Path(settings.out) if settings.out else Path(settings.run) / "evaluations" / f"{name}.json"
        if settings.out:
            check_file(f"out={settings.out}", out)
        from ..rendezvous import NotMet
        from .evaluate_run import results_of
    with one_line(CheckpointError, NotMet):
        found = results_of(settings, folder)
        if found is None:  # not the first rank
            return
        measures, results = found
        out.parent.mkdir(parents=True, exist_ok=True)
        with durable(out) as file:
            file.write(json.dumps(results, indent=1, default=str, ensure_ascii=False).encode())
        terminal.product()
        print(columns((key, f"{value:.4f}") for key, value in measures.items()))
        print(f"step {results['step']}: {len(measures)} measures; all results are in {out}")


if __name__ == "__main__":
    leave(main)
