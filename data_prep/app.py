"""The application behind `data_prep/tokenize.py`: reads the settings, tokenises or verifies, and reports."""

import io
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_prep import terminal
from data_prep.clean import DIGESTS_FILE, CleanConfig, digest_of, digests_of, find_duplicates, split_of
from data_prep.command import fail, run_hydra
from data_prep.corpus import LARGEST_DOCUMENT, CorpusConfig, FilesCorpus, HubCorpus, StdlibCorpus
from data_prep.drop import DropCopies, digest_of_places
from data_prep.durable import check_folder
from data_prep.encode import (
    UNFINISHED_FOLDER,
    EncodeJob,
    EncodeUnit,
    UnitStride,
    digests_path,
    finished_unit,
)
from data_prep.encoder import scheme_for
from data_prep.errors import DataError, headline
from data_prep.long import digest_and_size
from data_prep.output import QUARANTINE_FILE, Output
from data_prep.pool import Pool
from data_prep.progress import Progress
from data_prep.source import Document
from data_prep.stats import write_statistics
from data_prep.tally import Tally, save_quarantine, shown
from data_prep.terminal import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED
from data_prep.token_file import TOKENIZER_FOLDER, Manifest
from data_prep.tokenizer import BpeTokenizer, FileTokenizer, NamedTokenizer, Tokenizer, TokenizerConfig
from data_prep.unit import WorkUnit
from data_prep.verify import verify

EXIT_FAULTS = 1
PREPARE = "prepare"


@dataclass
class TokenizeConfig:
    """The settings that `conf/tokenize.yaml` composes."""

    corpus: CorpusConfig  # the text to read
    tokenizer: TokenizerConfig  # the tokenizer
    out: str | None = None  # folder to write
    verify: str | None = None  # instead of out: folder to check
    stats: str | None = None  # instead of out: folder to print statistics of
    val_fraction: float = 0.02  # fraction of the documents for validation, chosen by the hash of their text
    unit_mib: float = 16.0  # MiB of text per work unit, which makes one token file
    clean: CleanConfig = field(default_factory=CleanConfig)  # documents to leave out
    max_document_mib: float = LARGEST_DOCUMENT / 2**20  # MiB; a larger document is quarantined
    document_seconds: float = 600.0  # seconds; a document that takes the tokenizer longer is quarantined
    max_quarantined: int = 1000  # quarantined documents; one more ends the run
    gigatoken: bool = True  # use gigatoken if it is installed and its output matches tiktoken's
    workers: int = 0  # processes; 0: one per core
    #: K/N: only units K, K + N, ..., without the manifest; prepare: only what precedes all parts; null: everything
    part: str | None = None

    def __post_init__(self) -> None:
        for key in ("out", "verify", "stats"):
            if "://" in (path := getattr(self, key) or ""):
                raise DataError(f"{key}={path} must be a folder on the disk: upload or download all of it")
        if [self.out, self.verify, self.stats].count(None) != 2:
            raise DataError("give out=FOLDER to tokenise, verify=FOLDER to check one, or stats=FOLDER to count in one")
        if not 0 <= self.val_fraction < 1:
            raise DataError(f"val_fraction={self.val_fraction} must be in [0, 1)")
        for key in ("unit_mib", "max_document_mib", "document_seconds"):
            if not 0 < getattr(self, key) < math.inf:
                raise DataError(f"{key}={getattr(self, key)} must be positive and finite")
        if self.largest > LARGEST_DOCUMENT:
            raise DataError(f"max_document_mib={self.max_document_mib} must be at most {LARGEST_DOCUMENT >> 20}")
        if self.max_quarantined < 0:
            raise DataError(f"max_quarantined={self.max_quarantined} must not be negative")
        if self.workers < 0:
            raise DataError(f"workers={self.workers} must be positive, or 0 for one per core")
        if self.part not in (None, PREPARE):
            UnitStride.parse(self.part)

    @property
    def processes(self) -> int:
        return self.workers or len(os.sched_getaffinity(0))

    @property
    def units(self) -> UnitStride:
        return UnitStride() if self.part in (None, PREPARE) else UnitStride.parse(self.part)

    @property
    def unit_bytes(self) -> int:
        return max(1, int(self.unit_mib * 2**20))

    @property
    def largest(self) -> int:
        """Bytes that a document may have."""
        return max(1, int(self.max_document_mib * 2**20))

    def settings(self) -> dict[str, Any]:
        """The settings that determine the output, as JSON: neither `workers` nor `part` does."""
        config = {
            "tokenizer": self.tokenizer.describe(),
            "val_fraction": self.val_fraction,
            "unit_mib": self.unit_mib,
            "clean": self.clean.describe(),
            "max_document_mib": self.max_document_mib,
        }
        return json.loads(json.dumps({"corpus": self.corpus.describe(), "config": config}))


def tokenize(config: TokenizeConfig, out: Path) -> None:
    """Tokenises the corpus, or one part of it, into `out`; prints what it does. Raises DataError or OSError."""
    check_folder(f"out={out}", out)
    output = output_of(config, out)
    if manifest := output.finished():
        print(f"already done, nothing changed: {manifest.summary(out)}")
    elif config.part is None:
        tokenize_all(config, output)
    elif config.part == PREPARE:
        with prepared(config, output):
            print(f"prepared: {out}")
    else:
        tokenize_part(config, output)


def output_of(config: TokenizeConfig, out: Path) -> Output:
    return Output(out, config.settings(), tokenizer_from_corpus=isinstance(config.tokenizer, BpeTokenizer))


def tokenize_all(config: TokenizeConfig, output: Output) -> None:
    """Encodes every unit that is still missing, drops duplicates, and writes the manifest."""
    with prepared(config, output) as tokenizer:
        start = time.perf_counter()
        tally = encode(config, output.folder, tokenizer)
        manifest = tally.manifest(tokenizer, output.settings, output.folder)
        warn_of(tally, manifest, config)
        save_quarantine(output.folder / QUARANTINE_FILE, tally)
        output.finish(manifest)
    print(f"done: {manifest.summary(output.folder)}{tally.rate(time.perf_counter() - start)}")


def tokenize_part(config: TokenizeConfig, output: Output) -> None:
    """Encodes the units of one part. Parts may run at the same time, on any machines that share the folder."""
    with output.joined():
        start = time.perf_counter()
        tally = encode(config, output.folder, Tokenizer.load(output.folder / TOKENIZER_FOLDER))
    done = sum(not record.kept for record in tally.records.values())
    print(
        f"part {config.part} of {output.folder}: {done} units done,"
        f" {len(tally.records) - done} done before{tally.rate(time.perf_counter() - start)}"
    )


@contextmanager
def prepared(config: TokenizeConfig, output: Output) -> Iterator[Tokenizer]:
    """Locks the folder for this run alone, with the settings and the tokenizer saved in it."""
    config.corpus.ensure_documents()
    for remark in config.corpus.remarks():
        print(remark)
    tokenizer = tokenizer_for(config, output)
    with output.started():
        if not output.has_tokenizer:
            tokenizer.save(output.folder / TOKENIZER_FOLDER)
        yield tokenizer


def tokenizer_for(config: TokenizeConfig, output: Output) -> Tokenizer:
    """The tokenizer that an interrupted run left in the folder, or a new one."""
    if output.has_tokenizer:
        return Tokenizer.load(output.folder / TOKENIZER_FOLDER)
    start = time.perf_counter()
    tokenizer = config.tokenizer.build(lambda: training_texts(config))
    tokenizer.check_pattern()
    if isinstance(config.tokenizer, BpeTokenizer):
        seconds, wanted = time.perf_counter() - start, config.tokenizer.vocab_size
        print(f"trained a BPE of {tokenizer.vocab_size:,} rows in {seconds:.0f} s")
        if tokenizer.vocab_size < wanted:
            print(f"note: the corpus has too few pairs of tokens for tokenizer.vocab_size={wanted:,}")
    return tokenizer


def training_texts(config: TokenizeConfig) -> Iterator[str]:
    """Yields the training documents, large ones in pieces: the tokenizer must not see the validation documents."""
    for document in config.corpus.documents():
        if isinstance(document, Document):
            if split_of(digest_of(document.data), config.val_fraction) == "train":
                yield document.text
            continue
        try:
            split = split_of(digest_and_size(document.pieces(), config.largest)[0], config.val_fraction)
        except DataError:
            raise
        except ValueError:  # `encode` quarantines it
            continue
        if split == "train":
            yield from document.pieces()


def encode(config: TokenizeConfig, out: Path, tokenizer: Tokenizer) -> Tally:
    """Encodes the units of this run or part. A whole run also drops duplicates if the settings ask for it."""
    tally, job = Tally(config.max_quarantined), encode_job(config, out, tokenizer)
    units = config.corpus.units(config.unit_bytes)
    mine = (unit for unit in units if config.units.has(unit.index))
    with Pool(config.processes, job, config.document_seconds) as pool:
        with Progress(total_of(units, config.units)) as progress:
            sizes: dict[int, int] = {}

            def tasks() -> Iterator[EncodeUnit]:
                for unit in mine:
                    sizes[unit.index] = unit.size
                    if record := finished_unit(job, unit):
                        progress.there(unit.size)
                        tally.add(record)
                    else:
                        yield EncodeUnit(unit)

            for record in pool.run(tasks(), lambda: progress.show(*pool.running())):
                tally.add(record)
                progress.add(sizes[record.index], record.text_bytes, record.tokens)
        if config.clean.deduplicate and config.part is None:
            drop_copies(config, out, tally, pool)
    return tally


def encode_job(config: TokenizeConfig, out: Path, tokenizer: Tokenizer) -> EncodeJob:
    scheme = None
    if config.gigatoken:
        scheme, why_not = scheme_for(tokenizer, out, config.corpus.documents())
        if why_not:
            print(why_not)
    return EncodeJob(out, config.corpus, config.clean, config.val_fraction, config.largest, scheme)


def total_of(units: Iterable[WorkUnit], part: UnitStride) -> int | None:
    """Estimates the bytes of text to encode; None if the units are not known in advance (a stream)."""
    return sum(unit.size for unit in units if part.has(unit.index)) if isinstance(units, list) else None


def drop_copies(config: TokenizeConfig, out: Path, tally: Tally, pool: Pool) -> None:
    """Rewrites the units that hold duplicates of documents in earlier units or other folders, without them."""
    indices = sorted(tally.records)
    found = find_duplicates(
        [digests_path(out, index) for index in indices], list(map(digests_of, config.clean.exclude)), out / DIGESTS_FILE
    )
    numbers, places = (np.concatenate(column) for column in zip(*found, strict=True))
    order = np.argsort(numbers, kind="stable")
    bounds = np.searchsorted(numbers[order], np.arange(len(indices) + 1))
    by_index = {index: places[order[bounds[i] : bounds[i + 1]]] for i, index in enumerate(indices)}
    changed = {index for index in indices if digest_of_places(by_index[index]) != tally.records[index].dropped}
    again = {index for index in changed if tally.records[index].dropped}  # the corpus was mended: start from all

    def units(chosen: set[int]) -> Iterator[WorkUnit]:
        return (unit for unit in config.corpus.units(config.unit_bytes) if unit.index in chosen) if chosen else iter(())

    for record in pool.run(map(EncodeUnit, units(again)), lambda: None):
        tally.records[record.index] = record
    tasks = (DropCopies(unit, tally.records[unit.index], by_index[unit.index]) for unit in units(changed))
    for record in pool.run(tasks, lambda: None):
        tally.records[record.index] = record


def warn_of(tally: Tally, manifest: Manifest, config: TokenizeConfig) -> None:
    """Prints what was left out. Raises DataError if there is nothing to train on."""
    if tally.quarantined:
        print(f"quarantined {len(tally.quarantined)} documents, see {QUARANTINE_FILE}: {shown(tally.quarantined)}")
    left_out = [f"{manifest.corpus[key]:,} {key.replace('_', ' ')}" for key in ("too_short", "too_long", "duplicates")]
    if any(manifest.corpus[key] for key in ("too_short", "too_long", "duplicates")):
        print(f"left out: {', '.join(left_out)}")
    if not manifest.split("train"):
        raise DataError(
            f"the training split is empty: val_fraction={config.val_fraction} and clean.* must leave documents for it;"
            " lower them, or give more documents"
        )
    if config.val_fraction > 0 and not manifest.split("val"):
        print(
            f"warning: the validation split is empty: val_fraction={config.val_fraction} chose none of"
            f" {manifest.totals(['train'])[0]:,} documents; none is ever divided: raise val_fraction, or give more"
        )


def verify_folder(folder: Path) -> int:
    """Prints every fault on stderr, or one line that all is well; returns the exit code."""
    faults = verify(folder)
    for fault in faults:
        print(f"fault: {fault}", file=sys.stderr)
    if faults:
        print(f"{folder}: {len(faults)} faults", file=sys.stderr)
        return EXIT_FAULTS
    print(f"ok: {Manifest.load(folder).summary(folder)}")
    return 0


def register() -> None:
    """Registers the dataclasses with Hydra: the schema and the options of each group."""
    store = ConfigStore.instance()
    store.store(name="tokenize_schema", node=TokenizeConfig)
    for corpus in (StdlibCorpus, FilesCorpus, HubCorpus):
        store.store(group="corpus", name=corpus.kind, node=corpus)
    for tokenizer in (BpeTokenizer, NamedTokenizer, FileTokenizer):
        store.store(group="tokenizer", name=tokenizer.kind, node=tokenizer)


def run(composed: DictConfig) -> int:
    """Runs the program; returns its exit code."""
    try:
        return execute(config_of(composed))
    except (DataError, OmegaConfBaseException) as error:
        return fail(headline(error))


def config_of(composed: DictConfig) -> TokenizeConfig:
    """Checks what Hydra composed. Raises DataError or OmegaConf's own error if a setting is wrong."""
    if missing := OmegaConf.missing_keys(composed):
        raise DataError(f"{', '.join(sorted(missing))} must be given")
    config = OmegaConf.to_object(composed)
    assert isinstance(config, TokenizeConfig)
    refuse_unknown_keys(config)
    return config


def execute(config: TokenizeConfig) -> int:
    """Does what the settings ask for; returns the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may hold any bytes
    if config.verify is not None or config.stats is not None:
        terminal.product()  # what is printed is the result; otherwise the token files are
    try:
        if config.verify is not None:
            return verify_folder(Path(config.verify))
        if config.stats is not None:
            print(write_statistics(Path(config.stats)))
            return 0
        assert config.out is not None
        tokenize(config, Path(config.out))
        return 0
    except DataError as error:
        return fail(headline(error))
    except BrokenPipeError:  # the reader of the result has closed the pipe
        return EXIT_BROKEN_PIPE
    except OSError as error:
        return fail(f"{error}{what_is_kept(config)}")
    except KeyboardInterrupt:
        fail(f"interrupted{what_is_kept(config)}")
        return EXIT_INTERRUPTED


def what_is_kept(config: TokenizeConfig) -> str:
    """A remark for an error message, if the folder is left with finished units."""
    begun = config.out is not None and os.path.isdir(Path(config.out) / UNFINISHED_FOLDER)
    return "; finished units are kept, the same command continues" if begun else ""


def refuse_unknown_keys(config: TokenizeConfig) -> None:
    """Raises DataError if Hydra's +key=value has added a key that the dataclasses do not have."""
    for prefix, part in (
        ("", config),
        ("corpus.", config.corpus),
        ("tokenizer.", config.tokenizer),
        ("clean.", config.clean),
    ):
        known = [item.name for item in fields(part)]
        for key in vars(part).keys() - known:
            raise DataError(
                f"unknown key {prefix}{key}; there are {', '.join(prefix + name for name in known) or 'none'}"
            )


def _composed(config: DictConfig) -> None:
    sys.exit(run(config))


def main() -> None:
    """Parses the command line and runs; exits 0, 1 (verify found faults), or 2 (an error, in one line)."""
    register()
    run_hydra(_composed, "tokenize")
