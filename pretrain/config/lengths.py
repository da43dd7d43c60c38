"""Lengths of a run in steps, samples or tokens, and the batch sizes that convert between them.

Not part of training.py, because the optimizer's settings have lengths, too.
"""

import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # JobConfig converts all lengths, and sets what is not given
    Steps = int
    Number = float
    Count = int
else:
    Steps = int | float | str
    Number = float | None
    Count = int | None

NOT_GIVEN: Any = None  # default of a Number or Count
UNITS = ("steps", "samples", "tokens")
FACTORS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
FORM = re.compile(rf"(\d[\d_]*(?:\.\d+)?(?:[eE]\+?\d+)?) ?([kKMBT]?)[ _]?({'|'.join(UNITS)})?")


class Length(NamedTuple):
    """A whole number of a unit of UNITS."""

    number: int
    unit: str


def length_of(key: str, value: object, unit: str = "steps") -> Length:
    """Reads 1000, 2k, 1e9, `10B tokens` or `5M samples`. unit: of a number without one.

    Raises ValueError if the value has another form, or is not a whole number.
    """
    found = FORM.fullmatch(str(value).strip())
    number = Fraction(found[1].replace("_", "")) * FACTORS[found[2]] if found else Fraction(1, 2)
    if found is None or number.denominator != 1:
        raise ValueError(
            f"{key}={value} must be a whole number of steps, samples or tokens, such as 1000, 2k, 5M samples or"
            f" 10B tokens; without a unit: {unit}"
        )
    return Length(int(number), found[3] or unit)


def steps_or_text(key: str, value: object, least: int) -> int:
    """Returns a length in steps as a number, and any other length unchanged: `Batches.steps` converts it later.

    Raises ValueError if the value is not a length, or is below `least`.
    """
    length = length_of(key, value)
    if length.number < least:
        raise ValueError(f"{key}={value} must be at least {least}")
    return length.number if length.unit == "steps" else value  # type: ignore[return-value]


@dataclass(frozen=True)
class Batches:
    """Batch sizes of a run in samples, by first sample number, from 0 on. A step takes the size at its first sample."""

    sizes: tuple[tuple[int, int], ...]  # first sample and size, ascending
    seq_len: int  # tokens per sample

    @classmethod
    def of(cls, first: int, later: Mapping[object, int], seq_len: int) -> "Batches":
        """Builds from train.global_batch and train.batch_schedule. Raises ValueError if two entries begin together."""
        begins = {0: first}
        for key, size in later.items():
            number, unit = length_of("train.batch_schedule", key, "tokens")
            begin = -(-number // seq_len) if unit == "tokens" else number
            if begin in begins:
                raise ValueError(
                    f"train.batch_schedule.{key}={size} must begin at another sample than the entries before it"
                )
            begins[begin] = size
        return cls(tuple(sorted(begins.items())), seq_len)

    @property
    def constant(self) -> bool:
        return len(self.sizes) == 1

    @property
    def largest(self) -> int:
        return max(size for _, size in self.sizes)

    def size_at(self, sample: int) -> int:
        """Batch size of a step that begins at this sample."""
        return self.sizes[bisect_right(self.sizes, sample, key=lambda entry: entry[0]) - 1][1]

    def samples_after(self, steps: int, start: int = 0) -> int:
        """First sample after this number of steps from sample `start` on. Negative steps go back at the first size."""
        for (_, size), (end, _) in zip(self.sizes, self.sizes[1:], strict=False):
            inside = max(0, -(-(end - start) // size))
            if steps <= inside:
                return start + steps * size
            steps, start = steps - inside, start + inside * size
        return start + steps * self.sizes[-1][1]

    def steps_for(self, samples: int) -> int:
        """Fewest steps from sample 0 on that take at least this number of samples."""
        steps = start = 0
        for (_, size), (end, _) in zip(self.sizes, self.sizes[1:], strict=False):
            inside = max(0, -(-(min(end, samples) - start) // size))
            steps, start = steps + inside, start + inside * size
        return steps + max(0, -(-(samples - start) // self.sizes[-1][1]))

    def steps(self, key: str, value: object, *, since: int = 0, until: int | None = None) -> int:
        """Converts a length to steps, rounded up. since: step at which it begins; until: step at which it ends."""
        number, unit = length_of(key, value)
        if unit == "steps":
            return number
        samples = -(-number // self.seq_len) if unit == "tokens" else number
        if until is None:
            return self.steps_for(self.samples_after(since) + samples) - since
        begin = self.samples_after(until) - samples
        return until + 1 - self.steps_for(begin + 1) if begin >= 0 else until + 1
