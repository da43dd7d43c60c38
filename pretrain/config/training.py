"""Settings of the training loop: length, batch and precision. Group train."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .lengths import NOT_GIVEN, Batches, Count, Steps, length_of, steps_or_text
from .step_law import batch_for_steps, batch_for_tokens


@dataclass
class TrainingConfig:
    """Length, batch and precision of the training."""

    #: optimizer steps of the whole schedule; or samples or tokens, converted to steps: 2k, 1e5, 5M samples, 10B tokens
    steps: Steps = 1000
    #: save and stop after this step, or this number of samples or tokens; null: at the end of the schedule
    stop_after: Steps | None = None
    #: save and stop before the ranks have run for this time, such as 4h or 1d12h30m; null: no limit
    time_limit: str | None = None
    #: seconds without a finished step, evaluation batch or save before a rank prints its stacks and ends; 0: never
    hang_timeout: float = 1800.0
    seq_len: int | None = None  # tokens per sequence; null: model.context, at most 8192
    #: sequences per step, over all ranks; null: from the tokens of the run, by Step Law (Li et al., arXiv:2503.04715),
    #: as a power of two of at least 32
    global_batch: Count = NOT_GIVEN
    #: other batch sizes for later parts of the run, by the number of tokens, or samples, at which they begin:
    #: {2B: 512, 5M samples: 1024}; an entry at 0 replaces global_batch; empty: none
    batch_schedule: dict[Any, int] = field(default_factory=dict)
    micro_batch: int = 4  # sequences per rank and forward pass
    precision: str = "auto"  # bf16, fp32 or auto: bf16 if the device supports it natively

    def __post_init__(self) -> None:
        self.steps = steps_or_text("train.steps", self.steps, 1)
        if self.stop_after is not None:
            self.stop_after = steps_or_text("train.stop_after", self.stop_after, 0)
        for entry, size in list(self.batch_schedule.items()):
            if length_of("train.batch_schedule", entry, "tokens").unit == "steps":
                raise ValueError(f"train.batch_schedule.{entry}={size} must begin at a number of tokens or samples")
            if length_of("train.batch_schedule", entry).number == 0:
                self.global_batch = self.batch_schedule.pop(entry)
        given = {f"train.batch_schedule.{entry}": size for entry, size in self.batch_schedule.items()}
        given |= {f"train.{key}": getattr(self, key) for key in ("seq_len", "global_batch", "micro_batch")}
        for key, value in given.items():
            if value is not None and value < 1:
                raise ValueError(f"{key}={value} must be at least 1")
        if self.time_limit is not None and self.time_limit_seconds is None:
            raise ValueError(f"train.time_limit={self.time_limit} must be a time such as 4h, 90m or 1d12h (null: none)")
        if not self.hang_timeout >= 0:
            raise ValueError(f"train.hang_timeout={self.hang_timeout} must not be negative (0: never)")
        if self.precision not in ("auto", "bf16", "fp32"):
            raise ValueError(f"train.precision={self.precision} must be auto, bf16 or fp32")

    def settle_batch(self) -> None:
        """Sets the batch size if it is not given. JobConfig sets seq_len, which this needs."""
        assert self.seq_len is not None
        if self.global_batch is None:
            number, unit = length_of("train.steps", self.steps)
            if unit == "steps":
                self.global_batch = batch_for_steps(number, self.seq_len)
            else:
                self.global_batch = batch_for_tokens(number * (self.seq_len if unit == "samples" else 1), self.seq_len)

    def check_world(self, world: int) -> None:
        """Raises ValueError unless each batch is a whole number of micro-batches per rank, on `world` ranks."""
        product = self.micro_batch * world
        sizes = {"train.global_batch": self.global_batch}
        sizes |= {f"train.batch_schedule.{entry}": size for entry, size in self.batch_schedule.items()}
        for key, size in sizes.items():
            if size % product:
                below = size // product * product
                batches = f"{key}={f'{below} or ' if below else ''}{below + product}"
                each = size // world if size % world == 0 else 0
                micro = [str(size) for size in range(1, min(each, self.micro_batch) + 1) if each % size == 0][-2:]
                raise ValueError(
                    f"train.micro_batch={self.micro_batch} × {world} rank{'s' * (world > 1)} = {product}"
                    f" must divide {key}={size}; give {batches}"
                    + (f", or train.micro_batch={' or '.join(micro)}" if micro else "")
                )

    @property
    def time_limit_seconds(self) -> int | None:
        form = re.fullmatch(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", self.time_limit or "")
        if form is None or not self.time_limit:
            return None
        days, hours, minutes, seconds = (int(number or 0) for number in form.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60 + seconds

    @property
    def batches(self) -> Batches:
        """Batch sizes over the samples of the run. JobConfig sets seq_len, which this needs."""
        assert self.seq_len is not None
        return Batches.of(self.global_batch, self.batch_schedule, self.seq_len)

    @property
    def clock(self) -> Callable[[int], int]:
        """Progress at a step, for schedules: the samples before it, or the step itself if all batches are equal."""
        batches = self.batches
        return int if batches.constant else batches.samples_after

    @property
    def last_step(self) -> int:
        """Step after which this start of the run stops."""
        return self.steps if self.stop_after is None else min(self.stop_after, self.steps)
