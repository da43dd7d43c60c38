"""Counts a folder of token files, as text, as a page and as a picture. Reads every token, one thread per core.

FOLDER/statistics.txt    documents, tokens, bytes per token; lengths; the most frequent rows, and rows never used
FOLDER/statistics.html   the same as a page with charts, which needs no network
FOLDER/statistics.png    lengths, and how often each row is used; needs matplotlib
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np

from data_prep.columns import aligned
from data_prep.durable import durable
from data_prep.errors import DataError
from data_prep.faults import check
from data_prep.progress import progress
from data_prep.token_file import PIECE, SPLITS, TOKENIZER_FOLDER, TokenFile, TokenFileEntry
from data_prep.tokenizer import Tokenizer

TEXT_FILE, PAGE_FILE, PICTURE_FILE = "statistics.txt", "statistics.html", "statistics.png"
BINS = 31  # of document lengths: [2^k, 2^(k + 1)) tokens
ROWS_SHOWN = 20
NO_TOKEN = "no token has this id"
RARE = 100  # uses; a row with fewer is hardly trained
SHARES = (0.5, 0.9, 0.99, 0.999)


@dataclass
class Counts:
    """Counts of some documents. Lengths are in tokens and include the end-of-document id."""

    uses_V: np.ndarray  # how often each row is used
    text_bytes: int = 0
    shortest: int = 2**31
    longest: int = 0
    documents_in: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))  # by length
    tokens_in: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))

    @property
    def documents(self) -> int:
        return int(self.documents_in.sum())

    @property
    def tokens(self) -> int:
        return int(self.uses_V.sum())

    def add(self, other: "Counts") -> None:
        self.uses_V += other.uses_V
        self.text_bytes += other.text_bytes
        self.shortest, self.longest = min(self.shortest, other.shortest), max(self.longest, other.longest)
        self.documents_in += other.documents_in
        self.tokens_in += other.tokens_in


def write_statistics(folder: Path) -> str:
    """Writes the files; returns the text, and a line on what was written. Raises DataError if the folder is damaged."""
    from data_prep.stats_page import statistics_page  # it imports this module

    by_split, tokenizer = count(folder), Tokenizer.load(folder / TOKENIZER_FOLDER)
    text = "\n".join(page(folder, by_split, tokenizer)) + "\n"
    with durable(folder / TEXT_FILE) as file:
        file.write(text.encode())
    with durable(folder / PAGE_FILE) as file:
        file.write(statistics_page(folder, by_split, tokenizer).encode())
    try:
        picture = draw(by_split)
    except ImportError:
        written = f"{folder / TEXT_FILE} and {PAGE_FILE}"
        return f"{text}\nwrote {written}; {PICTURE_FILE} needs matplotlib: pip install matplotlib"
    with durable(folder / PICTURE_FILE) as file:
        file.write(picture)
    return f"{text}\nwrote {folder / TEXT_FILE}, {PAGE_FILE} and {PICTURE_FILE}"


def count(folder: Path) -> dict[str, Counts]:
    """Counts by split, for the splits that have documents."""
    manifest, by_split = check(folder), {}

    def of_entry(entry: TokenFileEntry) -> Counts:
        counts = count_file(TokenFile(folder / entry.name), manifest.vocab_size)
        counts.text_bytes = entry.text_bytes
        return counts

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for split in SPLITS:
            total = Counts(np.zeros(manifest.vocab_size, np.int64))
            entries = manifest.split(split)
            for counts in progress(pool.map(of_entry, entries), f"count {split}", len(entries)):
                total.add(counts)
            if total.documents:
                by_split[split] = total
    return by_split


def count_file(file: TokenFile, vocab_size: int) -> Counts:
    """Counts one file, except its bytes of text, which only the manifest has."""
    counts = Counts(np.zeros(vocab_size, np.int64))
    for start in range(0, file.size, PIECE):
        ids = file.tokens[start : start + PIECE]
        for id in (int(ids.min()), int(ids.max())):  # before counting, which takes memory up to the largest
            if not 0 <= id < vocab_size:
                raise DataError(f"{file.prefix}.bin: id {id} must be in [0, {vocab_size}); see verify=")
        counts.uses_V += np.bincount(ids, minlength=vocab_size)
    for fault in file.index_faults():
        raise DataError(f"{fault}; see verify=")
    for start in range(0, len(file.lengths), PIECE):
        lengths = file.lengths[start : start + PIECE]
        bins = np.frexp(lengths)[1] - 1  # exact, as log2 is not
        counts.documents_in += np.bincount(bins, minlength=BINS)
        counts.tokens_in += np.bincount(bins, lengths, minlength=BINS).astype(np.int64)
        counts.shortest, counts.longest = (
            min(counts.shortest, int(lengths.min())),
            max(counts.longest, int(lengths.max())),
        )
    return counts


def whole(by_split: dict[str, Counts]) -> Counts:
    total = Counts(np.zeros_like(next(iter(by_split.values())).uses_V))
    for counts in by_split.values():
        total.add(counts)
    return total


def page(folder: Path, by_split: dict[str, Counts], tokenizer: Tokenizer) -> Iterator[str]:
    """Yields the lines of the page."""
    total = whole(by_split)
    yield f"{folder}: {len(total.uses_V):,} rows, tokenizer {tokenizer.spec.name} {tokenizer.fingerprint[:12]}"
    yield ""
    yield from aligned(fact_rows(by_split))
    yield ""
    yield from aligned([["tokens per document", "documents", "of all", "tokens in them"], *length_rows(total)])
    yield ""
    yield from used_rows(total, tokenizer)


def fact_rows(by_split: dict[str, Counts]) -> list[list[str]]:
    """A table with one column per split, and one for all; the first row is the head."""
    columns = by_split if len(by_split) == 1 else {**by_split, "all": whole(by_split)}
    return [
        ["", *columns],
        ["documents", *(f"{counts.documents:,}" for counts in columns.values())],
        ["tokens", *(f"{counts.tokens:,}" for counts in columns.values())],
        ["bytes of text", *(f"{counts.text_bytes:,}" for counts in columns.values())],
        ["bytes per token", *(f"{counts.text_bytes / counts.tokens:.3f}" for counts in columns.values())],
        ["tokens per document", *(f"{counts.tokens / counts.documents:,.1f}" for counts in columns.values())],
        ["shortest", *(f"{counts.shortest:,}" for counts in columns.values())],
        ["longest", *(f"{counts.longest:,}" for counts in columns.values())],
    ]


def length_rows(total: Counts) -> Iterator[list[str]]:
    filled = np.flatnonzero(total.documents_in)
    for k in range(filled[0], filled[-1] + 1):
        documents, tokens = int(total.documents_in[k]), int(total.tokens_in[k])
        low, high = 2**k, 2 ** (k + 1) - 1
        label = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        yield [label, f"{documents:,}", f"{documents / total.documents:.2%}", f"{tokens / total.tokens:.2%}"]


def used_rows(total: Counts, tokenizer: Tokenizer) -> Iterator[str]:
    yield from usage_lines(total)
    yield ""
    most = most_used_rows(total, tokenizer)
    yield from aligned([["most frequent row", "uses", "of all", "text"], *most], left=(3,))
    never, some = int((total.uses_V == 0).sum()), never_used_rows(total, tokenizer)
    if never:
        yield ""
        yield from aligned([["row never used", "text"], *some], left=(1,))
        if never > ROWS_SHOWN:
            yield f"and {never - ROWS_SHOWN:,} more"


def usage_lines(total: Counts) -> Iterator[str]:
    """Says how many rows are used, and how evenly."""
    uses = np.sort(total.uses_V)[::-1]
    reached = np.cumsum(uses) / total.tokens
    rare, never = int(((uses > 0) & (uses < RARE)).sum()), int((uses == 0).sum())
    shares = ", ".join(f"{share:.1%} in {int(np.searchsorted(reached, share)) + 1:,}" for share in SHARES)
    yield f"rows used: {int((uses > 0).sum()):,}; of all tokens {shares}"
    yield f"rows used less than {RARE} times: {rare:,}; never: {never:,}"


def most_used_rows(total: Counts, tokenizer: Tokenizer) -> list[list[str]]:
    """Id, uses, share of all tokens, and text of the most frequent rows."""
    order = np.argsort(-total.uses_V, kind="stable")[: min(ROWS_SHOWN, int((total.uses_V > 0).sum()))]
    return [
        [str(id), f"{total.uses_V[id]:,}", f"{total.uses_V[id] / total.tokens:.2%}", shown(id, tokenizer)]
        for id in order.tolist()
    ]


def never_used_rows(total: Counts, tokenizer: Tokenizer) -> list[list[str]]:
    """Id and text of the first rows that no token uses."""
    never = np.flatnonzero(total.uses_V == 0)[:ROWS_SHOWN].tolist()
    return [[str(id), shown(id, tokenizer)] for id in never]


def shown(id: int, tokenizer: Tokenizer) -> str:
    try:
        text = tokenizer.decode_bytes([id])
    except DataError:
        return NO_TOKEN
    try:
        return repr(text.decode())
    except UnicodeDecodeError:
        return repr(text)


def draw(by_split: dict[str, Counts]) -> bytes:
    """Draws a PNG. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    total = whole(by_split)
    figure = Figure(figsize=(11, 4), layout="constrained")
    lengths, rows = figure.subplots(1, 2)
    filled = np.flatnonzero(total.documents_in)
    k = np.arange(filled[0], filled[-1] + 1)
    for offset, name, values in ((-0.2, "documents", total.documents_in), (0.2, "tokens in them", total.tokens_in)):
        lengths.bar(k + offset, values[k] / values.sum(), width=0.4, label=name)
    lengths.set_xticks(k, [f"{2**i:,}" for i in k.tolist()], rotation=45, ha="right")
    lengths.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    lengths.set(title="Length of the documents", xlabel="tokens per document, at least")
    for split, counts in by_split.items():
        uses = np.sort(counts.uses_V)[::-1]
        used = int((uses > 0).sum())
        # A line of as many points as the eye can tell apart: 500,000 rows would make a picture of megabytes.
        places = np.unique(np.geomspace(1, used, 500).astype(np.int64))
        rows.plot(places, uses[places - 1], label=f"{split}: {len(uses) - used:,} of {len(uses):,} rows never")
    rows.set(title="Use of the rows", xlabel="rank of the row by frequency", ylabel="uses", xscale="log", yscale="log")
    rows.xaxis.set_major_formatter("{x:,.0f}")
    for axes in (lengths, rows):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    return picture.getvalue()
