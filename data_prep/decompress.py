"""Reads compressed streams to their last byte: a truncated or malformed stream is always an error.

The standard library's BZ2File and LZMAFile are not used, because they stop silently at unknown bytes.
"""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO, cast

BY_SUFFIX = {".gz": "gzip", ".gzip": "gzip", ".bgz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2"}
BY_SUFFIX |= {".xz": "xz", ".lzma": "xz", ".lz4": "lz4", ".br": "brotli"}
MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", b"\x5d\0\0": "xz"}
MAGIC |= {b"\x04\x22\x4d\x18": "lz4"}
SKIPPABLE = b"\x2a\x4d\x18"  # last three bytes of the magic of a skippable frame, in zstd and lz4
READ_BYTES = 1 << 18


def compression_by_content(head: bytes) -> str | None:
    """Detects the compression from the first bytes; never brotli, which has no magic bytes."""
    for magic, name in MAGIC.items():
        if head.startswith(magic) and (magic != b"BZh" or head[4:10] in (b"1AY&SY", b"\x17rE8P\x90")):
            return name
    return "zstd" if head[1:4] == SKIPPABLE and head[0] >> 4 == 5 else None


def decompressed(raw: BinaryIO, compression: str) -> io.RawIOBase:
    """Decompresses `raw` as a stream. Closing the stream leaves `raw` open."""
    if compression in STREAMS:
        return Streams(raw, STREAMS[compression])
    import pyarrow

    return cast(io.RawIOBase, pyarrow.CompressedInputStream(raw, compression))


class Gzip:
    """A zlib decompressor with the interface of bz2's and lzma's."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(16 + zlib.MAX_WBITS)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)


STREAMS: dict[str, Callable[[], Any]] = {
    "gzip": Gzip,
    "bz2": bz2.BZ2Decompressor,
    "xz": lzma.LZMADecompressor,
}


class Streams(io.RawIOBase):
    """One or more concatenated compressed streams. Zero bytes after a stream are skipped."""

    def __init__(self, raw: BinaryIO, new: Callable[[], Any]) -> None:
        self._raw, self._new = raw, new
        self._current: Any = None
        self._input = b""
        self._ended = 0  # number of streams read to their end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._current is not None or self._begins():
            data, self._input = self._input, b""
            if not data and self._current.needs_input:
                data = self._raw.read(READ_BYTES)
            out = self._current.decompress(data, len(buffer))
            if self._current.eof:
                self._input, self._current = self._current.unused_data, None
                self._ended += 1
            elif not data and not out:
                raise EOFError("it is cut off: Truncated compressed stream")
            if out:
                buffer[: len(out)] = out
                return len(out)
        return 0

    def _begins(self) -> bool:
        """True if one more stream begins."""
        while True:
            self._input = self._input or self._raw.read(READ_BYTES)
            if not self._input:
                return False
            if self._ended:  # tapes and block devices pad with zeros
                self._input = self._input.lstrip(b"\0")
            if self._input:
                self._current = self._new()
                return True
