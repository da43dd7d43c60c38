"""Intervals [first, stop) of sample numbers that a run leaves out. Apart from samples.py, because settings and
checkpoints use them without data.
"""

from collections.abc import Iterable, Iterator, Sequence

Interval = Sequence[int]


def merged(intervals: Iterable[Interval]) -> list[list[int]]:
    """Returns the same samples as disjoint intervals that do not touch, in ascending order."""
    found: list[list[int]] = []
    for first, stop in sorted(map(tuple, intervals)):
        if found and first <= found[-1][1]:
            found[-1][1] = max(found[-1][1], stop)
        else:
            found.append([first, stop])
    return found


def length(intervals: Iterable[Interval]) -> int:
    """Returns the number of samples in disjoint intervals."""
    return sum(stop - first for first, stop in intervals)


def below(intervals: Iterable[Interval], sample: int) -> list[list[int]]:
    """Returns the part of the intervals below a sample number, merged."""
    return merged([first, min(stop, sample)] for first, stop in intervals if first < sample)


def kept(left_out: Iterable[Interval], start: int, count: int) -> Iterator[tuple[int, int]]:
    """Yields intervals with the first `count` samples from `start` on that are not left out. left_out: merged."""
    for first, stop in left_out:
        if not count:
            return
        if start < first:
            end = min(first, start + count)
            yield start, end
            count -= end - start
        start = max(start, stop)
    if count:
        yield start, start + count
