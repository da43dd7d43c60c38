"""Parquet: a piece for each row group, and the column of the texts, a few rows at a time."""

from collections.abc import Iterator

from data_prep.errors import DataError
from data_prep.source import FileInfo, Piece, open_raw, reading


def row_groups(file: FileInfo, column: str) -> list[Piece]:
    """A piece for each row group, by its number. DataError where there is no such column of text."""
    with reading(file.path), open_raw(file.path) as raw:
        from pyarrow import parquet

        opened_file = parquet.ParquetFile(raw)
        names = opened_file.schema_arrow.names
        if column not in names:
            raise DataError(f"{file.path}: no column {column!r} (corpus.text_key); it has {', '.join(names)}")
        kind = str(opened_file.schema_arrow.field(column).type)
        if not any(word in kind for word in ("string", "binary", "null")):
            raise DataError(f"{file.path}: column {column!r} (corpus.text_key) must be text, not {kind}")
        metadata = opened_file.metadata
        place = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == column)
        sizes = [metadata.row_group(i).column(place).total_uncompressed_size for i in range(metadata.num_row_groups)]
    return [Piece(file.path, file.stamp, size, number, number + 1) for number, size in enumerate(sizes)]


def rows_of(piece: Piece, column: str, rows_at_once: int) -> Iterator[tuple[int, bytes | None]]:
    """The column's values in the piece's row groups, and their rows in the file."""
    with reading(piece.path), open_raw(piece.path) as raw:
        import pyarrow
        from pyarrow import parquet

        file = parquet.ParquetFile(raw)
        assert piece.stop is not None
        number = sum(file.metadata.row_group(i).num_rows for i in range(piece.start))
        groups = list(range(piece.start, piece.stop))
        for batch in file.iter_batches(rows_at_once, row_groups=groups, columns=[column]):
            values = batch.column(0)
            if pyarrow.types.is_dictionary(values.type):
                values = values.dictionary_decode()
            for value in values.cast(pyarrow.large_binary()).to_pylist():  # so that bad UTF-8 is one row's, not all's
                yield number, value
                number += 1
