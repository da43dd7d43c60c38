"""Complete settings of a run: one dataclass of all groups, and the rules across groups."""

from dataclasses import dataclass
from pathlib import Path

from ..families import FAMILIES, ModelConfig
from .checkpoint import CheckpointConfig
from .data import DataConfig
from .decay_from import step_decayed
from .ema import EmaConfig
from .engine import DeepSpeedConfig, FSDP2Config
from .evaluation import EvalConfig
from .guard import GuardConfig
from .init_from import folder_of
from .monitor import LogConfig, MonitorConfig, ProfileConfig
from .optim import OptimConfig
from .step_law import learning_rate
from .training import TrainingConfig
from .vocab import VocabConfig

CONFIG_FILE = "config.yaml"  # in the run folder: the settings of the latest start
LONGEST_SEQUENCE = 8192  # tokens, if train.seq_len is not given; a model's context can be too long for pretraining


@dataclass
class RunConfig:
    """The folder of the run."""

    dir: str = ""  # folder of the run; the same command with the same folder resumes the run

    def __post_init__(self) -> None:
        if not self.dir:
            raise ValueError("run.dir is missing: name a folder for the run, such as run.dir=runs/a")


@dataclass
class JobConfig:
    """Complete settings of a run."""

    seed: int  # seed of the initial weights and of the order of the samples
    model: ModelConfig  # family and sizes of the body
    vocab: VocabConfig  # the embedding matrix and the loss
    data: DataConfig  # the corpora
    optim: OptimConfig  # optimizer and learning rate
    engine: FSDP2Config | DeepSpeedConfig  # the engine, which shards and steps the body
    train: TrainingConfig  # length, batch and precision of the training
    eval: EvalConfig  # when and on how much text the validation loss is measured
    ema: EmaConfig  # running average of the weights
    checkpoint: CheckpointConfig  # when the run saves and which checkpoints it keeps
    log: LogConfig  # when and where metrics are logged
    monitor: MonitorConfig  # measurements of the weights during training
    guard: GuardConfig  # what a run does at a loss spike
    profile: ProfileConfig  # traces of some steps
    run: RunConfig  # folder of the run
    init_from: str | None = None  # hf:DIR: start from the weights of a Hugging Face model; null: random weights by seed
    #: RUN or RUN/STEP: a new run that goes on from this checkpoint of a wsd run, with its settings, and decays over
    #: optim.decay_steps; null: none
    decay_from: str | None = None

    def __post_init__(self) -> None:
        if self.init_from is not None:
            folder_of(self.init_from)
        if self.train.seq_len is None:
            self.train.seq_len = min(self.model.context, LONGEST_SEQUENCE)
        if self.train.seq_len > self.model.context:
            raise ValueError(f"train.seq_len={self.train.seq_len} must not exceed model.context={self.model.context}")
        if self.engine.offload != "none" and not self.optim.can_offload:
            raise ValueError(
                f"engine.offload={self.engine.offload} must be none with optim.name={self.optim.name}:"
                " Newton-Schulz would run on the CPU; give engine.offload=none or optim=adamw"
            )
        self._settle_lengths()
        self.vocab.check_steps(self.train.steps)
        self.profile.check_steps(self.train.last_step)
        if self.guard.level == "rollback":
            self.checkpoint.check_rollback(self.guard.margin)
        limit, reserve = self.train.time_limit_seconds, self.checkpoint.reserve_seconds
        if limit is not None and limit <= reserve:
            raise ValueError(
                f"train.time_limit={self.train.time_limit} must exceed checkpoint.reserve_seconds={reserve}"
            )

    def _settle_lengths(self) -> None:
        """Converts all lengths to steps, and sets batch size, learning rate and warm-up if they are not given."""
        self.train.settle_batch()
        train, optim, batches = self.train, self.optim, self.train.batches
        if self.decay_from is not None:
            begin = step_decayed(self.decay_from)
            if optim.schedule != "wsd" or not optim.decay_steps:
                raise ValueError(
                    f"decay_from={self.decay_from} must have optim.schedule=wsd and the length of the decay, such as"
                    f" optim.decay_steps=1000; they are {optim.schedule} and {optim.decay_steps or 'null'}"
                )
            train.steps = begin + batches.steps("optim.decay_steps", optim.decay_steps, since=begin)
            optim.decay_steps = train.steps - begin
        train.steps = batches.steps("train.steps", train.steps)
        if train.stop_after is not None:
            train.stop_after = batches.steps("train.stop_after", train.stop_after)
        optim.settle(batches, train.steps)
        if optim.lr is None and optim.base_width is not None:
            raise ValueError(
                f"optim.base_width={optim.base_width} must have optim.lr, the rate at that width: the default is for"
                f" model.width={self.model.width}"
            )
        if optim.lr is None:
            parameters = FAMILIES[self.model.family].parameters(self.model)
            optim.lr = learning_rate(parameters, batches.samples_after(train.steps) * self.seq_len)

    def resolve(self) -> None:
        """Makes the paths of all inputs absolute, because a job may run in another folder."""
        self.data.resolve()
        if self.eval.tasks_path:
            self.eval.tasks_path = str(Path(self.eval.tasks_path).absolute())
        self.log.resolve()
        if self.init_from is not None:
            self.init_from = f"hf:{folder_of(self.init_from).absolute()}"
        if self.decay_from is not None:
            self.decay_from = str(Path(self.decay_from).absolute())

    @property
    def reads(self) -> list[Path]:
        """Paths of all inputs: the corpora, the model of `init_from` and the checkpoint of `decay_from`."""
        model = [] if self.init_from is None else [folder_of(self.init_from)]
        checkpoint = [] if self.decay_from is None else [Path(self.decay_from)]
        return [*map(Path, self.data.reads), *model, *checkpoint]

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
