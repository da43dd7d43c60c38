"""Formats text tables, for commands in three packages. Imports nothing heavy."""

from collections.abc import Collection, Sequence


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """Formats one line per row, in columns of equal width. Columns in `left` are aligned left, the others (numbers)
    right; -1 is the last column.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    lines = []
    for row in rows:
        cells = (
            cell.ljust(width) if k in left or (k == last and -1 in left) else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return lines
