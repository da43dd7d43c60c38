"""All settings of a run: the parts' own dataclasses in one, and the rules that reach across them."""

from dataclasses import dataclass
from pathlib import Path

from .changes import CONFIG_FILE
from .checkpoint import CheckpointConfig
from .data import DataConfig
from .engine.deepspeed import DeepSpeedConfig
from .engine.fsdp2 import FSDP2Config
from .hooks import EvalConfig
from .interop import folder_of
from .models.gpt2 import GPT2Config
from .models.llama import LlamaConfig
from .monitor import LogConfig, MonitorConfig
from .optim import OptimConfig
from .trainer import TrainingConfig
from .vocab import VocabConfig

LONGEST_SEQUENCE = 8192  # tokens, unless train.seq_len is given: a model may see far more than is sane to train at


@dataclass
class RunConfig:
    """dir: the folder of the run; the same command with the same folder resumes."""

    dir: str = ""

    def __post_init__(self) -> None:
        if not self.dir:
            raise ValueError("run.dir is missing: name a folder for the run, such as run.dir=runs/a")


@dataclass
class JobConfig:
    """All settings of a run. init_from: hf:DIR begins with the weights of a Hugging Face model; null: drawn by seed."""

    seed: int
    model: GPT2Config | LlamaConfig
    vocab: VocabConfig
    data: DataConfig
    optim: OptimConfig
    engine: FSDP2Config | DeepSpeedConfig
    train: TrainingConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig
    log: LogConfig
    monitor: MonitorConfig
    run: RunConfig
    init_from: str | None = None

    def __post_init__(self) -> None:
        if self.init_from is not None:
            folder_of(self.init_from)
        if self.train.seq_len is None:
            self.train.seq_len = min(self.model.context, LONGEST_SEQUENCE)
        self.optim.warmup_steps = self.optim.warmup(self.train.steps)
        if self.train.seq_len > self.model.context:
            raise ValueError(f"train.seq_len={self.train.seq_len} must not exceed model.context={self.model.context}")
        if self.vocab.untie_at is not None and self.vocab.untie_at >= self.train.steps:
            raise ValueError(f"vocab.untie_at={self.vocab.untie_at} must be below train.steps={self.train.steps}")
        limit, reserve = self.train.time_limit_seconds, self.checkpoint.seconds_before_limit
        if limit is not None and limit <= reserve:
            raise ValueError(
                f"train.time_limit={self.train.time_limit} must exceed checkpoint.seconds_before_limit={reserve}"
            )

    def resolve(self) -> None:
        """Makes the paths of what is read whole: a job may run in another folder."""
        self.data.resolve()
        if self.init_from is not None:
            self.init_from = f"hf:{folder_of(self.init_from).absolute()}"

    @property
    def reads(self) -> list[Path]:
        """Corpora, and the model that it begins with."""
        model = [] if self.init_from is None else [folder_of(self.init_from)]
        return [*map(Path, self.data.paths.values()), *model]

    @property
    def seq_len(self) -> int:
        assert self.train.seq_len is not None
        return self.train.seq_len

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir)

    @property
    def path(self) -> Path:
        return self.run_dir / CONFIG_FILE
