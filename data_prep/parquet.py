"""Reads parquet: one piece per row group, and only the column of the text, a few rows at a time."""

from collections.abc import Iterator
from typing import Any

from data_prep.errors import DataError
from data_prep.source import BLOCK_BYTES, PARQUET, FileInfo, Form, Piece, open_raw, reading

ROWS_AT_ONCE = 256
BATCH_BYTES = 2 << 20  # bytes of rows at once, for rows of about the same size


def row_groups(file: FileInfo, column: str) -> list[Piece]:
    """One piece per row group, by its number. Raises DataError if the file has no text column of that name."""
    with reading(file.path), open_raw(file.path) as raw:
        from pyarrow import parquet

        opened_file = parquet.ParquetFile(raw)
        names = opened_file.schema_arrow.names
        if names.count(column) > 1:
            raise DataError(
                f"{file.path}: {names.count(column)} columns are called {column!r} (corpus.text_key); keep one of them"
            )
        if column not in names:
            raise DataError(f"{file.path}: no column {column!r} (corpus.text_key); it has {', '.join(names)}")
        kind = opened_file.schema_arrow.field(column).type
        if not is_text(kind):
            raise DataError(f"{file.path}: column {column!r} (corpus.text_key) must be text, not {kind}")
        metadata = opened_file.metadata
        place = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == column)
        sizes = [metadata.row_group(i).column(place).total_uncompressed_size for i in range(metadata.num_row_groups)]
    return [
        Piece(file.path, file.stamp, size, number, number + 1, form=Form(PARQUET)) for number, size in enumerate(sizes)
    ]


def is_text(kind: Any) -> bool:
    """True if Arrow's type is a text type, or the type of a column of nulls."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return is_text(kind.value_type)
    text = (types.is_string, types.is_large_string, types.is_string_view)
    binary = (types.is_binary, types.is_large_binary, types.is_binary_view)
    return any(is_kind(kind) for is_kind in (*text, *binary, types.is_null))


def bytes_of(values: Any) -> Any:
    """Arrow's array of text as an array of bytes, so that bad UTF-8 fails one row and not all."""
    import pyarrow

    if pyarrow.types.is_dictionary(values.type):  # dictionary_decode does not support dictionaries of views
        return bytes_of(values.dictionary).take(values.indices)
    return values.cast(pyarrow.large_binary())


def rows_of(piece: Piece, column: str) -> Iterator[tuple[int, bytes | None]]:
    """Yields the column's values in the piece's row groups, each with its row number in the file."""
    with reading(piece.path), open_raw(piece.path) as raw:
        from pyarrow import parquet

        # Without both settings the whole column chunk is held in memory.
        file = parquet.ParquetFile(raw, pre_buffer=False, buffer_size=BLOCK_BYTES)
        assert piece.stop is not None
        number = sum(file.metadata.row_group(i).num_rows for i in range(piece.start))
        groups = list(range(piece.start, piece.stop))
        rows = sum(file.metadata.row_group(i).num_rows for i in groups)
        at_once = max(1, min(ROWS_AT_ONCE, rows * BATCH_BYTES // max(1, piece.size)))
        for batch in file.iter_batches(at_once, row_groups=groups, columns=[column]):
            for value in bytes_of(batch.column(0)).to_pylist():
                yield number, value
                number += 1
