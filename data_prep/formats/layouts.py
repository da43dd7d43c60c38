"""Layouts of other programs' token files, to the byte. All numbers are little-endian.

megatron    PREFIX.bin, PREFIX.idx      the same as ours, see data_prep/token_file.py: only an import is needed
llmc        *.bin                       256 int32: magic, version, tokens, zeros; then the ids. 20240520 and 1: uint16;
                                        20240801 and 7: uint32. The end-of-document id stands before each document.
                                        modded-nanogpt uses the first
datatrove   *.ds                        the ids, uint16 up to 65,535 rows, else uint32
            *.ds.index                  one uint64 per document: the token at which it ends
            *.ds.metadata               three lines: tokenizer|bytes per id, tokens, tokens in short form
nanogpt     train.bin, val.bin          the ids, uint16, no header
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np

from data_prep.durable import DurableFile, durable
from data_prep.errors import DataError
from data_prep.formats.stream import PIECE_TOKENS, Tokens
from data_prep.token_file import TokenFile, with_suffix

UINT16, UINT32 = np.dtype("<u2"), np.dtype("<u4")


class Layout(ABC):
    """A layout: one option of from= and to=."""

    name: ClassVar[str]
    suffix: ClassVar[str]  # suffix of the files that `open` takes

    @abstractmethod
    def open(self, path: Path, vocab_size: int) -> Tokens:
        """Opens a file. Raises DataError with file and rule if it does not have this layout."""

    def export(self, files: list[TokenFile], folder: Path, split: str, vocab_size: int, tokenizer: str) -> None:
        """Writes one split's files. tokenizer: its name."""
        raise DataError(
            f"to={self.name}: no export is needed, it reads our files: give it the prefixes FOLDER/train-00000, ..."
        )


class Megatron(Layout):
    name, suffix = "megatron", ".idx"

    def open(self, path: Path, vocab_size: int) -> Tokens:
        file = TokenFile(path)
        for fault in file.index_faults():
            raise DataError(fault)
        return Tokens(path, file.tokens, partial(self._ends, file))

    def _ends(self, file: TokenFile, start: int, stop: int) -> np.ndarray:
        """Ends of documents: the start of the next one, and the end of the file."""
        last = [file.size] if stop == file.size else []
        return np.unique(np.array([*file.document_starts(start + 1, stop + 1), *last], np.int64))


class LlmC(Layout):
    name, suffix = "llmc", ".bin"
    HEADER_BYTES = 1024
    VARIANTS: ClassVar[dict[tuple[int, int], np.dtype]] = {(20240520, 1): UINT16, (20240801, 7): UINT32}

    def open(self, path: Path, vocab_size: int) -> Tokens:
        size = path.stat().st_size
        header = np.fromfile(path, "<i4", min(size, self.HEADER_BYTES) // 4)
        magic, version, tokens = (int(number) for number in header[:3]) if len(header) == 256 else (0, 0, 0)
        dtype = self.VARIANTS.get((magic, version))
        if dtype is None:
            known = " or ".join(f"{magic} and {version}" for magic, version in self.VARIANTS)
            raise DataError(f"{path}: not a file of llm.c: magic and version are {magic} and {version}, not {known}")
        expected = self.HEADER_BYTES + tokens * dtype.itemsize
        if size != expected:
            raise DataError(f"{path}: {size} bytes, but its header of {tokens} tokens says {expected}")
        return Tokens(path, mapped(path, dtype, self.HEADER_BYTES))

    def export(self, files: list[TokenFile], folder: Path, split: str, vocab_size: int, tokenizer: str) -> None:
        dtype = UINT16 if vocab_size <= 2**16 else UINT32
        (magic, version), *_ = (key for key, value in self.VARIANTS.items() if value == dtype)
        for number, file in enumerate(files):
            if file.size >= 2**31:
                raise DataError(f"{file.prefix}.bin: {file.size} tokens, but a file of llm.c must have fewer than 2^31")
            header = np.zeros(256, "<i4")
            header[:3] = magic, version, file.size
            with durable(folder / f"{split}_{number:06d}.bin") as made:
                made.write(header.data.cast("B"))
                write_ids(
                    made, [file.tokens[-1:], file.tokens[:-1]], dtype
                )  # llm.c has the id before a document, ours after it


class Datatrove(Layout):
    name, suffix = "datatrove", ".ds"

    def open(self, path: Path, vocab_size: int) -> Tokens:
        index = with_suffix(path, ".index")
        if not index.is_file():
            raise DataError(f"{index} is missing")
        if index.stat().st_size % 8:
            raise DataError(f"{index}: {index.stat().st_size} bytes must be a multiple of 8")
        ends, size = mapped(index, np.dtype("<u8")), path.stat().st_size
        tokens = int(ends[-1]) if len(ends) else 0
        dtype = UINT16 if size == 2 * tokens else UINT32
        if size != tokens * dtype.itemsize:
            raise DataError(f"{path}: {size} bytes, but its index says {tokens} tokens of 2 or 4")
        for start in range(0, len(ends), PIECE_TOKENS):
            if (np.diff(ends[start : start + PIECE_TOKENS + 1].astype(np.int64)) < 0).any():
                raise DataError(f"{index}: the ends of the documents must rise")
        return Tokens(path, mapped(path, dtype), partial(self._ends, ends))

    def _ends(self, ends: np.ndarray, start: int, stop: int) -> np.ndarray:
        low, high = np.searchsorted(ends, np.array([start, stop], np.uint64), side="right")
        return np.unique(ends[low:high].astype(np.int64))  # an empty document ends where another does

    def export(self, files: list[TokenFile], folder: Path, split: str, vocab_size: int, tokenizer: str) -> None:
        dtype = UINT16 if vocab_size < 2**16 else UINT32
        (folder / split).mkdir()  # datatrove's reader takes every file of a folder
        for number, file in enumerate(files):
            path = folder / split / f"{split}-{number:05d}.ds"
            with durable(with_suffix(path, ".index")) as made:
                for start in range(0, len(file.lengths), PIECE_TOKENS):
                    some = slice(start, start + PIECE_TOKENS)
                    ends = file.pointers[some] // file.dtype.itemsize + file.lengths[some]
                    made.write(ends.astype("<u8").data.cast("B"))
            with durable(with_suffix(path, ".metadata")) as made:
                tokens = file.size
                made.write(f"{tokenizer}|{dtype.itemsize}\n{tokens}\n{in_short(tokens)}".encode())
            with durable(path) as made:
                write_ids(made, [file.tokens], dtype)


class NanoGpt(Layout):
    name, suffix = "nanogpt", ".bin"

    def open(self, path: Path, vocab_size: int) -> Tokens:
        size = path.stat().st_size
        if size % 2:
            raise DataError(f"{path}: {size} bytes must be even: nanoGPT's ids are uint16")
        return Tokens(path, mapped(path, UINT16))

    def export(self, files: list[TokenFile], folder: Path, split: str, vocab_size: int, tokenizer: str) -> None:
        if vocab_size > 2**16:
            raise DataError(f"to=nanogpt: its ids are uint16, but the tokenizer has {vocab_size} rows")
        with durable(folder / f"{split}.bin") as made:
            write_ids(made, [file.tokens for file in files], UINT16)


LAYOUTS = {layout.name: layout for layout in (Megatron(), LlmC(), Datatrove(), NanoGpt())}


def mapped(path: Path, dtype: np.dtype, offset: int = 0) -> np.ndarray:
    if path.stat().st_size == offset:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r", offset=offset).view(np.ndarray)


def write_ids(file: DurableFile, parts: Iterable[np.ndarray], dtype: np.dtype) -> None:
    for part in parts:
        for start in range(0, len(part), PIECE_TOKENS):
            file.write(part[start : start + PIECE_TOKENS].astype(dtype).data.cast("B"))


def in_short(tokens: int) -> str:
    """Formats a number of tokens as datatrove does, with three digits and a prefix: 1.23 MT."""
    power = min(int(math.log10(tokens)), 20) if tokens else 0
    prefix = ["", "k", "M", "G", "T", "P", "E"][power // 3]
    return f"{tokens / 10 ** (power // 3 * 3):.{2 - power % 3}f} {prefix}T"
