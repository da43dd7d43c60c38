"""Weights & Biases and MLflow as targets of a run's scalars. Not part of monitor/, which imports torch.

Neither takes a point back. So a target first finds out which points it has, and skips those.
"""

import re
import secrets
import shutil
import time
from pathlib import Path
from typing import Any, Protocol

from data_prep.durable import durable

Scalars = dict[str, float]  # of one logged step, "step" among them
TARGETS = {"wandb": "Weights & Biases", "mlflow": "MLflow"}  # the names are keys of `log` and of the command
ID_FILE = "tracking_id"  # in the run's folder; its run has this id there
TAG = "rowshard_id"  # of a run in MLflow, which chooses ids itself
REQUEST = {"metrics": 1000, "params": 100, "tags": 100}  # MLflow's most of each in one request


class Target(Protocol):
    """One run in one system. Any method may raise any error of the package; nothing is lost if it is called again."""

    where: str  # where to look

    def send(self, lines: list[Scalars]) -> None:
        """Logs steps, in order. Skips what the target has already."""

    def close(self) -> None:
        """Waits until everything has arrived."""


def identity(run: Path) -> str:
    """The id of the run in all targets, kept in RUN/tracking_id; a new one if there is none."""
    path = run / ID_FILE
    if not path.exists():
        with durable(path) as file:
            file.write(secrets.token_hex(8).encode() + b"\n")
    return path.read_text().strip()


def title(run: Path) -> str:
    """The name of the run in all targets: the last two parts of its folder, so that jobs of a sweep differ."""
    return "/".join(run.absolute().parts[-2:])


def connect(name: str, value: str, run: Path, project: str, settings: dict[str, Any]) -> Target:
    """Connects to the target `name`; value: as in `log.NAME`; settings: of the run, by dotted keys."""
    kind: type[WandbTarget] | type[MLflowTarget] = WandbTarget if name == "wandb" else MLflowTarget
    return kind(value, run, project, settings)


class WandbTarget:
    """A run of W&B. Online, it resumes the run after the last step that the server has. Offline, RUN/wandb has one
    folder with the whole run, written again by each start: so it has no step of a start that was killed.
    """

    def __init__(self, mode: Any, run: Path, project: str, settings: dict[str, Any]) -> None:
        import wandb

        name, offline = identity(run), mode == "offline"
        for older in (run / "wandb").glob(f"offline-run-*-{name}") if offline else ():
            shutil.rmtree(older)
        self._run = wandb.init(
            project=project,
            id=name,
            name=title(run),
            dir=run,
            mode=mode,
            resume=None if offline else "allow",
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.config.update(settings, allow_val_change=True)
        self.where = self._run.dir.removesuffix("/files") if offline else str(self._run.url)
        self._next = self._run.step

    def send(self, lines: list[Scalars]) -> None:
        for line in lines:
            step = int(line["step"])
            if step >= self._next:  # the newest step stays open until a later one, so it may be given again
                self._run.log({key: value for key, value in line.items() if key != "step"}, step=step)
                self._next = step

    def close(self) -> None:
        self._run.finish()


class MLflowTarget:
    """A run of MLflow, found by its tag. Of each metric it has the steps up to the last one that MLflow has."""

    def __init__(self, address: str, run: Path, project: str, settings: dict[str, Any]) -> None:
        from mlflow import MlflowClient

        self._client, name = MlflowClient(tracking_uri=address), identity(run)
        found = self._client.get_experiment_by_name(project)
        experiment = found.experiment_id if found else self._client.create_experiment(project)
        runs = self._client.search_runs([experiment], f"tags.{TAG} = '{name}'")
        mine = runs[0] if runs else self._client.create_run(experiment, tags={TAG: name}, run_name=title(run))
        self._id, self.where = mine.info.run_id, f"{address}, experiment {project}, run {mine.info.run_id}"
        self._client.update_run(self._id, status="RUNNING")
        self._describe(settings, mine.data.params)
        self._last = {key: self._last_step(key) for key in mine.data.metrics}

    def send(self, lines: list[Scalars]) -> None:
        from mlflow.entities import Metric

        metrics, last, now = [], dict(self._last), int(time.time() * 1000)
        for line in lines:
            for key, value in line.items():
                known, step = metric_key(key), int(line["step"])
                if key != "step" and step > last.get(known, -1):
                    metrics.append(Metric(known, float(value), now, step))
                    last[known] = step
        self._log(metrics=metrics)
        self._last = last

    def close(self) -> None:
        self._client.set_terminated(self._id)

    def _describe(self, settings: dict[str, Any], known: dict[str, str]) -> None:
        """Logs the settings as parameters, which MLflow never changes; those that have changed since, as tags."""
        from mlflow.entities import Param, RunTag

        texts = {key: str(value) for key, value in settings.items() if str(value)}
        self._log(params=[Param(key, text) for key, text in texts.items() if key not in known])
        changed = {key for key in texts.keys() & known.keys() if texts[key] != known[key]}
        self._log(tags=[RunTag(f"changed.{key}", texts[key]) for key in sorted(changed)])

    def _last_step(self, key: str) -> int:
        return max(point.step for point in self._client.get_metric_history(self._id, key))

    def _log(self, **entities: list[Any]) -> None:
        for kind, items in entities.items():
            for first in range(0, len(items), REQUEST[kind]):
                request: dict[str, Any] = {kind: items[first : first + REQUEST[kind]]}
                self._client.log_batch(self._id, **request)


def metric_key(key: str) -> str:
    """The name in MLflow of a key of metrics.jsonl. A folder of MLflow cannot have both `a` and `a/b`."""
    return re.sub(r"[^\w.\- ]", "_", key.replace("/", "."))
