"""Detects the content of a file by its first bytes: the form in which it is read, or why it cannot be read.

Text, rows of JSON and brotli have no magic bytes, so the file's name decides between them. source.py opens and reads
the files.
"""

import codecs
import tarfile

from data_prep import lfs
from data_prep.decompress import compression_by_content
from data_prep.json_values import BOM, SPACE, is_object, is_values
from data_prep.source import LINES, PARQUET, TEXT, VALUES, FileInfo, Form, compression_of, kind_of, opened, reading

HEAD_BYTES = 1 << 16
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
PARQUET_SUFFIX, PARQUET_MAGIC = ".parquet", b"PAR1"

UNPACK = "unpack it, or leave it out of corpus.paths"
CONVERT = "convert it to .jsonl or .parquet, or leave it out of corpus.paths"
ARCHIVES = {
    b"PK\x03\x04": "a zip archive (.docx, .xlsx, .npz and .pt files are zip archives, too)",
    b"PK\x05\x06": "an empty zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"!<arch>\n": "an ar archive",
    b"xar!": "a xar archive",
    b"\x1f\x9d": "compressed by compress (.Z)",
    b"\xff\x06\x00\x00sNaPpY": "compressed by snappy",
    b"\x89LZO\0": "compressed by lzop",
    b"LZIP\x01": "compressed by lzip",
}
FORMATS = {
    b"ARROW1\0\0": "an Arrow (Feather) file",
    b"\xff\xff\xff\xff": "an Arrow stream, as datasets' save_to_disk writes it",
    b"FEA1": "a Feather file",
    b"Obj\x01": "an Avro file",
    b"SQLite format 3\0": "an SQLite database",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
    b"MMIDIDX\0": "the index of a token file: it is tokenised already",
    b"GGUF": "a GGUF model",
    b"%PDF-": "a PDF",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "an Office document",
    b"\x89PNG\r\n\x1a\n": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF87a": "a GIF image",
    b"GIF89a": "a GIF image",
    b"II*\0": "a TIFF image",
    b"MM\0*": "a TIFF image",
    b"\x7fELF": "an ELF program",
    b"WARC/": "a WARC archive",
}
BINARY_FORMATS = {b"ORC": "an ORC file", b"RIFF": "a RIFF file (WebP, WAV, AVI)", b"MZ": "a Windows program"}
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
CONTROL = bytes(set(range(32)) - set(b"\t\n\v\f\r\b\x1b"))


def look(file: FileInfo) -> Form | str:
    """Returns the file's form, or a text that says what is wrong and what to do. Raises DataError if it cannot be
    opened or decompressed.
    """
    with reading(file.path):
        head = head_of(file.path, None)
        named = compression_of(file.path)
        compression = compression_by_content(head)
        if compression is None and named == "brotli" and head:
            compression = named
        if compression:
            head = head_of(file.path, compression)
        if reason := refused(head):
            return f"{compression} around {reason}" if compression else reason
        if compression and compression_by_content(head):
            return f"compressed twice: {UNPACK}"
        if named and not compression and head:
            return f"its name says {named}, but its content is not {named}: fetch it again, or rename it"
        return form_of(file.path, head, compression)


def head_of(path: str, compression: str | None) -> bytes:
    with opened(path, compression, HEAD_BYTES) as stream:
        return stream.read(HEAD_BYTES)


def form_of(path: str, head: bytes, compression: str | None) -> Form | str:
    kind = kind_of(path)
    if head.startswith(PARQUET_MAGIC) or kind == PARQUET_SUFFIX:
        return f"Parquet within {compression}: {UNPACK}" if compression else Form(PARQUET)
    if kind not in JSON_SUFFIXES:
        return Form(TEXT, compression)
    whole = len(head) < HEAD_BYTES
    if is_values(head, whole):
        return Form(VALUES, compression)
    start = head.removeprefix(BOM).lstrip(SPACE)
    if kind == ".json" and start.startswith(b"["):
        return f"an array whose elements are not objects: {CONVERT}"
    lines = head.split(b"\n") if whole else head.split(b"\n")[:-1]
    lines = [line for line in lines if line.strip(SPACE)]
    if len(lines) > 1 and not any(is_object(line.removeprefix(BOM)) for line in lines):
        return f"named {kind}, but none of its first {len(lines):,} lines is a JSON object: {CONVERT}"
    return Form(LINES, compression)


def refused(head: bytes) -> str | None:
    """Says what the content is and what to do, if it is neither text nor Parquet; else None."""
    for known, advice in ((ARCHIVES, UNPACK), (FORMATS, CONVERT)):
        for magic, name in known.items():
            if head.startswith(magic):
                return f"{name}: {advice}"
    if head.startswith(lfs.MARK):
        return "a Git LFS pointer, not the data: fetch the data with `git lfs pull`"
    if head.startswith(UTF_16):
        return "UTF-16 text: convert it with `iconv -f UTF-16 -t UTF-8`"
    if is_tar(head):
        return f"a tar archive: {UNPACK}"
    if is_binary(head) and not head.startswith(PARQUET_MAGIC) and not compression_by_content(head):
        name = next((name for magic, name in BINARY_FORMATS.items() if head.startswith(magic)), "binary data, not text")
        return f"{name}: {CONVERT}"
    return None


def is_tar(head: bytes) -> bool:
    """Checks the first member's checksum, because the oldest tar format has no magic bytes."""
    if b"\0" not in head[:512]:
        return False
    try:
        tarfile.TarInfo.frombuf(head[:512], "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def is_binary(head: bytes) -> bool:
    """True if there are many zero bytes, as in UTF-16, or if it is not UTF-8 and has control characters."""
    start = head[:64]
    if start.count(0) * 4 > len(start):
        return True
    if head.removeprefix(BOM).lstrip(SPACE)[:1] in (b"{", b"["):  # JSON: bad rows are quarantined one by one
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return len(head.translate(None, CONTROL)) < len(head)
    return False
