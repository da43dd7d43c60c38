"""Checks a folder of token files against its manifest without reading tokens; `verify` does the rest."""

from collections.abc import Iterator
from pathlib import Path

from data_prep.errors import DataError
from data_prep.token_file import TOKENIZER_FOLDER, Manifest, TokenFileEntry, read_header, token_dtype, with_suffix
from data_prep.tokenizer_spec import TokenizerSpec


def check(folder: Path) -> Manifest:
    """The cheap half of `verify`, for the start of a training: reads no token.

    Compares the manifest with the tokenizer, and the files' names, sizes and types with the manifest. Raises DataError
    on the first fault.
    """
    manifest = Manifest.load(Path(folder))
    for fault in cheap_faults(Path(folder), manifest):
        raise DataError(fault)
    return manifest


def cheap_faults(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Yields the faults that show without reading a token; reads the header of each index."""
    where = folder / TOKENIZER_FOLDER
    yield from or_unreadable(where, _tokenizer_faults(where, manifest))
    for entry in manifest.files:
        prefix = folder / entry.name
        yield from or_unreadable(prefix, _file_faults(prefix, manifest, entry))
    expected = {entry.name for entry in manifest.files}
    for path in sorted([*folder.glob("*.bin"), *folder.glob("*.idx")]):
        if path.stem not in expected:
            yield f"{path} is not in the manifest: does it come from another folder, with another tokenizer?"


def or_unreadable(where: Path, faults: Iterator[str]) -> Iterator[str]:
    """Yields the faults. A file that cannot be read is one more fault, the last."""
    try:
        yield from faults
    except OSError as error:
        yield f"{error.filename or where} cannot be read: {error.strerror or error}"


def _tokenizer_faults(where: Path, manifest: Manifest) -> Iterator[str]:
    try:
        spec = TokenizerSpec.load(where)
    except DataError as error:
        yield str(error)
        return
    if spec.fingerprint != manifest.tokenizer_fingerprint:
        yield (
            f"{where}: fingerprint {spec.fingerprint[:12]}, but the tokens were made with"
            f" {manifest.tokenizer_fingerprint[:12]}: it is another tokenizer"
        )
    if spec.vocab_size != manifest.vocab_size:
        yield f"{where}: {spec.vocab_size} rows, but the manifest says {manifest.vocab_size}"


def _file_faults(prefix: Path, manifest: Manifest, entry: TokenFileEntry) -> Iterator[str]:
    dtype, found = token_dtype(manifest.vocab_size), None
    if (index := with_suffix(prefix, ".idx")).is_file():
        try:
            found = read_header(index)[0]
        except DataError as error:
            yield str(error)
    if found not in (None, dtype):
        yield f"{index}: ids of {found}, but a tokenizer of {manifest.vocab_size} rows needs {dtype}"
        return
    for suffix, expected in entry.sizes(dtype).items():
        path = with_suffix(prefix, suffix)
        if not path.is_file():
            yield f"{path} is missing"
        elif (size := path.stat().st_size) != expected:
            yield f"{path}: {size} bytes, but the manifest says {expected}"
