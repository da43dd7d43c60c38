"""Measures reading windows from token files, on one core and from the page cache, against nanoGPT's slice of a memmap.

    python tests/benchmarks/reading.py [--millions 100] [--length 2048] [--folder .]

Prints Markdown: the speed of random windows, then the time to find a sample of a run. All lines read batches of 16
windows, as a training does. Bare slices are converted to int64 and stacked, once for the tokens and once for the
targets; they have neither documents nor epochs.
"""

import argparse
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import numpy as np

from data_prep.token_file import HEADER, MAGIC, VERSION, TokenFile, TokenFileWriter
from pretrain.data import Order, PackedWindows, Windows
from tests.benchmarks.measure import interleaved_times, markdown

ROWS = 32_768
DRAWS = 4_096  # windows per repetition
BATCH = 16  # windows
SEEKS = 1_000
LARGEST = 10**9  # samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=100, help="of tokens")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        print(reading(Path(folder) / "text", int(options.millions * 1e6), options.length, options.repeats))
        print(f"\n{seeking(Path(folder) / 'sparse', options.length)}")


def reading(prefix: Path, tokens: int, T: int, repeats: int) -> str:
    write_documents(prefix, tokens)
    files = (TokenFile(prefix),)
    draws = np.random.default_rng(0).integers(0, tokens // T - 1, DRAWS)
    stream, kinds = files[0].tokens, {"windows": Windows(files, T), "masked": Windows(files, T, masked=True)}

    def bare() -> None:
        for places in (draws * T).reshape(-1, BATCH).tolist():
            np.stack([stream[place : place + T].astype(np.int64) for place in places])
            np.stack([stream[place + 1 : place + T + 1].astype(np.int64) for place in places])

    def ours(windows: Windows) -> Callable[[], None]:
        def read() -> None:
            for indices in (draws % len(windows)).reshape(-1, BATCH).tolist():
                windows.batch(indices)

        return read

    begin = time.perf_counter()
    kinds["packed"] = PackedWindows(files, T)
    planned = time.perf_counter() - begin
    steps = {"bare slices": bare} | {f"Rowshard, {kind}": ours(windows) for kind, windows in kinds.items()}
    seconds = interleaved_times(steps, repeats)
    rows = [
        [name, f"{DRAWS * T / 1e6 / its:,.0f}", f"{seconds['bare slices'] / its:.2f}"] for name, its in seconds.items()
    ]
    return (
        f"{tokens / 1e6:,.0f} M tokens in {files[0].documents:,} documents, windows of {T:,}; packing was planned in"
        f" {planned:.2f} s\n\n" + markdown(["windows at random, 16 at a time", "M tokens/s", "× bare slices"], rows)
    )


def write_documents(prefix: Path, tokens: int) -> None:
    """Writes documents with lengths as in text: log-normal, a thousand tokens on average."""
    generator = np.random.default_rng(0)
    with TokenFileWriter(prefix, ROWS) as file:
        while file.tokens < tokens:
            length = 1 + int(min(tokens, generator.lognormal(6.3, 1.1)))
            file.add(generator.integers(0, ROWS, length, dtype=np.int32))


def write_sparse(prefix: Path, tokens: int) -> None:
    """Writes a pair with the given number of zeros, sparse on the disk, in documents of the greatest length."""
    lengths = [min(2**31 - 1, tokens - start) for start in range(0, tokens, 2**31 - 1)]
    ends = np.cumsum(lengths)
    header = HEADER.pack(MAGIC, VERSION, 8, len(lengths), len(lengths) + 1)
    parts = np.array(lengths, "<i4"), ((ends - lengths) * 2).astype("<i8"), np.arange(len(lengths) + 1, dtype="<i8")
    prefix.with_suffix(".idx").write_bytes(header + b"".join(part.tobytes() for part in parts))
    with open(prefix.with_suffix(".bin"), "wb") as stream:
        stream.truncate(2 * tokens)


def seeking(prefix: Path, T: int) -> str:
    """Measures opening token files and finding samples, for corpora of a thousand and of 10⁹ samples."""
    rows = []
    for samples in (1_000, LARGEST):
        write_sparse(prefix, samples * T + 1)
        tracemalloc.start()
        begin = time.perf_counter()
        windows = Windows((TokenFile(prefix),), T)
        order = Order(len(windows), 0, "corpus")
        opened = time.perf_counter() - begin
        firsts = np.random.default_rng(0).integers(0, samples, SEEKS).tolist()
        begin = time.perf_counter()
        for first in firsts:
            order(first, 1)
        found = (time.perf_counter() - begin) / SEEKS
        begin = time.perf_counter()
        order(firsts[0], 1_024)
        batch = time.perf_counter() - begin
        held = tracemalloc.get_traced_memory()[1] / 1024
        tracemalloc.stop()
        rows.append([f"{samples:,}", f"{opened * 1e3:.2f}", f"{found * 1e6:.0f}", f"{batch * 1e3:.2f}", f"{held:,.0f}"])
    titles = ["samples", "open, ms", "find one, µs", "find 1,024, ms", "memory, KiB"]
    return markdown(titles, rows)


if __name__ == "__main__":
    main()
