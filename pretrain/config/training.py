"""Settings of the training loop: length, batch and precision. Group train."""

import re
from dataclasses import dataclass


@dataclass
class TrainingConfig:
    """Length, batch and precision of the training."""

    steps: int = 1000  # optimizer steps of the whole schedule
    stop_after: int | None = None  # save and stop after this step; null: at the end of the schedule
    #: save and stop before the ranks have run for this time, such as 4h or 1d12h30m; null: no limit
    time_limit: str | None = None
    #: seconds without a finished step, evaluation batch or save before a rank prints its stacks and ends; 0: never
    hang_timeout: float = 1800.0
    seq_len: int | None = None  # tokens per sequence; null: model.context, at most 8192
    global_batch: int = 32  # sequences per step, over all ranks
    micro_batch: int = 4  # sequences per rank and forward pass
    precision: str = "auto"  # bf16, fp32 or auto: bf16 if the device supports it natively

    def __post_init__(self) -> None:
        for key in ("steps", "seq_len", "global_batch", "micro_batch"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ValueError(f"train.{key}={getattr(self, key)} must be at least 1")
        if self.stop_after is not None and self.stop_after < 0:
            raise ValueError(f"train.stop_after={self.stop_after} must not be negative (null: run to the end)")
        if self.time_limit is not None and self.time_limit_seconds is None:
            raise ValueError(f"train.time_limit={self.time_limit} must be a time such as 4h, 90m or 1d12h (null: none)")
        if not self.hang_timeout >= 0:
            raise ValueError(f"train.hang_timeout={self.hang_timeout} must not be negative (0: never)")
        if self.precision not in ("auto", "bf16", "fp32"):
            raise ValueError(f"train.precision={self.precision} must be auto, bf16 or fp32")

    def check_world(self, world: int) -> None:
        """Raises ValueError unless the global batch is a whole number of micro-batches per rank, on `world` ranks."""
        product = self.micro_batch * world
        if self.global_batch % product:
            below = self.global_batch // product * product
            batches = f"train.global_batch={f'{below} or ' if below else ''}{below + product}"
            each = self.global_batch // world if self.global_batch % world == 0 else 0
            micro = [str(size) for size in range(1, min(each, self.micro_batch) + 1) if each % size == 0][-2:]
            raise ValueError(
                f"train.micro_batch={self.micro_batch} × {world} rank{'s' * (world > 1)} = {product}"
                f" must divide train.global_batch={self.global_batch}; give {batches}"
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
    def last_step(self) -> int:
        """Step after which this start of the run stops."""
        return self.steps if self.stop_after is None else min(self.stop_after, self.steps)
