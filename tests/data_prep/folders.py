"""Token files made by hand."""

from pathlib import Path

import numpy as np

from data_prep.token_file import Manifest, TokenFileEntry, TokenFileWriter
from tests.data_prep.commands import small_spec


def write(prefix: Path, documents: list[list[int]], vocab_size: int = 1000) -> TokenFileWriter:
    with TokenFileWriter(prefix, vocab_size) as writer:
        for ids in documents:
            writer.add(np.array(ids, dtype=np.uint32))
    return writer


def make_folder(folder: Path) -> Manifest:
    """A finished folder of one train and one val file."""
    spec = small_spec()
    spec.save(folder / "tokenizer")
    entries = []
    for split in ("train", "val"):
        writer = write(folder / f"{split}-00000", [[1, 2, 259], [3, 259]], spec.vocab_size)
        entries.append(TokenFileEntry(f"{split}-00000", split, 2, 5, 3, 259, writer.sha256))
    manifest = Manifest(1, spec.fingerprint, spec.vocab_size, {}, {}, tuple(entries))
    manifest.save(folder)
    return manifest
