"""Settings of what a run shows of itself: log, measurements of the weights, traces. Groups log, monitor, profile."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

LONGEST_TRACE = 50  # steps: each takes megabytes of memory and of the trace


@dataclass
class LogConfig:
    """Scalars in RUN/metrics.jsonl, in TensorBoard and on the terminal."""

    every: int = 10  # steps between log entries; the first and the last step of each start are always logged
    tensorboard: bool = True  # also write event files for TensorBoard to the run's folder
    wandb: str | None = None  # online or offline: also log to Weights & Biases, offline to RUN/wandb; null: do not
    mlflow: str | None = None  # also log to MLflow: a server, as in http://host:5000, or file:DIR; null: do not
    project: str = "rowshard"  # project in Weights & Biases, experiment in MLflow
    wait_seconds: float = 20.0  # at the end of a start, when all is saved: longest wait for their last steps to arrive

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"log.every={self.every} must be at least 1")
        if self.wait_seconds < 0:
            raise ValueError(f"log.wait_seconds={self.wait_seconds} must not be negative")
        if self.wandb not in (None, "online", "offline"):
            raise ValueError(f"log.wandb={self.wandb} must be online, offline or null")
        if self.mlflow is not None and self.mlflow != "databricks" and ":" not in self.mlflow:
            raise ValueError(f"log.mlflow={self.mlflow} must be an address such as http://host:5000, or file:DIR")
        if not self.project:
            raise ValueError("log.project must not be empty: it names the project in W&B and the experiment in MLflow")

    @property
    def targets(self) -> dict[str, str]:
        """The targets besides files, by their keys in this group."""
        return {name: value for name in ("wandb", "mlflow") if (value := getattr(self, name)) is not None}

    def resolve(self) -> None:
        """Makes the folder of MLflow absolute."""
        scheme, _, folder = (self.mlflow or "").partition(":")
        if scheme == "file" and not folder.startswith("/"):
            self.mlflow = f"file:{Path(folder).absolute()}"

    def check_targets(self, environment: Mapping[str, str] | None = None) -> None:
        """Raises ValueError if the package of a target is missing. environment: W&B must find a key there or in netrc's
        file; None: not checked.
        """
        for name, value in self.targets.items():
            if find_spec(name) is None:
                raise ValueError(
                    f"log.{name}={value} needs a package that is not installed: pip install 'rowshard[{name}]',"
                    f" or give log.{name}=null"
                )
        if self.wandb == "online" and environment is not None:
            netrc = Path(environment.get("NETRC", "~/.netrc")).expanduser()
            if not (environment.keys() & {"WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"} or netrc.exists()):
                raise ValueError(
                    "log.wandb=online needs an API key: run `wandb login`, set WANDB_API_KEY, or give log.wandb=offline"
                )


@dataclass
class MonitorConfig:
    """Measurements of the weights during training."""

    embedding_every: int = 0  # steps between measurements of the matrix: rows and both gradients; 0: never
    lens_every: int = 0  # steps between logit lens measurements on validation windows; 0: never
    lens_windows: int = 8  # validation windows per lens measurement, over all ranks

    def __post_init__(self) -> None:
        for key in ("embedding_every", "lens_every"):
            if getattr(self, key) < 0:
                raise ValueError(f"monitor.{key}={getattr(self, key)} must not be negative (0: never)")
        if self.lens_windows < 1:
            raise ValueError(f"monitor.lens_windows={self.lens_windows} must be at least 1")


@dataclass
class ProfileConfig:
    """Traces of some steps by torch.profiler, in RUN/profile."""

    steps: list[int] = field(default_factory=list)  # first and last step of the trace, such as [10,12]; empty: no trace
    ranks: list[int] = field(default_factory=lambda: [0])  # ranks that write a trace

    def __post_init__(self) -> None:
        if not self.steps:
            return
        given = f"profile.steps={_listed(self.steps)}"
        if len(self.steps) != 2:
            raise ValueError(f"{given} must be two steps, the first and the last of the trace, such as [10,12]")
        first, last = self.steps
        if not 1 <= first <= last:
            raise ValueError(f"{given} must begin at step 1 or later, and end at its first step or later")
        if last - first >= LONGEST_TRACE:
            raise ValueError(f"{given} must be at most {LONGEST_TRACE} steps: a trace of more is too large to be read")
        if not self.ranks or min(self.ranks) < 0:
            raise ValueError(f"profile.ranks={_listed(self.ranks)} must be at least one rank, such as [0]")

    def check_steps(self, last_step: int) -> None:
        """Raises ValueError if the trace would go beyond the last step of this start."""
        if self.steps and self.steps[1] > last_step:
            raise ValueError(
                f"profile.steps={_listed(self.steps)} must not go beyond step {last_step}, the last of this start"
                " (train.steps, train.stop_after)"
            )

    def check_world(self, world: int) -> None:
        """Raises ValueError if a rank of the trace does not exist."""
        if self.steps and max(self.ranks) >= world:
            raise ValueError(
                f"profile.ranks={_listed(self.ranks)} must be below {world}, the number of ranks, which count from 0"
            )


def _listed(numbers: list[int]) -> str:
    """The numbers as a command line gives them."""
    return f"[{','.join(map(str, numbers))}]"
