"""The application behind `data_prep/tokenize.py`: settings, then tokenise or verify, then a report."""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tqdm import tqdm

from data_prep.command import EXIT_INTERRUPTED, fail, run_hydra
from data_prep.corpus import CorpusConfig, FilesCorpus, HubCorpus, StdlibCorpus
from data_prep.encode import EncodeJob, Part, UnitRecord, digest_of, encode_corpus, split_of
from data_prep.errors import DataError, headline
from data_prep.output import Output
from data_prep.token_file import FORMAT_VERSION, TOKENIZER_FOLDER, Manifest
from data_prep.tokenizer import BpeTokenizer, FileTokenizer, NamedTokenizer, Tokenizer, TokenizerConfig
from data_prep.verify import verify

CONF = Path(__file__).resolve().parent.parent / "conf"
EXIT_FAULTS = 1
PREPARE = "prepare"
NAMES_SHOWN = 3


@dataclass
class TokenizeConfig:
    """What `conf/tokenize.yaml` composes."""

    corpus: CorpusConfig
    tokenizer: TokenizerConfig
    out: str | None = None  # the folder to write
    verify: str | None = None  # instead: the folder to check
    val_fraction: float = 0.02  # of the documents, by the hash of their text
    unit_mib: float = 16.0  # text in one work unit, hence in one token file
    workers: int = 0  # processes; 0: one a core
    part: str | None = None  # K/N: units K, K + N, ... alone, without manifest; prepare: what comes before all parts

    def __post_init__(self) -> None:
        if (self.out is None) == (self.verify is None):
            raise DataError("give out=FOLDER to tokenise, or verify=FOLDER to check one")
        if not 0 <= self.val_fraction < 1:
            raise DataError(f"val_fraction={self.val_fraction} must be in [0, 1)")
        if not self.unit_mib > 0:
            raise DataError(f"unit_mib={self.unit_mib} must be positive")
        if self.workers < 0:
            raise DataError(f"workers={self.workers} must be positive, or 0 for one a core")
        if self.part not in (None, PREPARE):
            Part.parse(self.part)

    @property
    def processes(self) -> int:
        return self.workers or len(os.sched_getaffinity(0))

    @property
    def units(self) -> Part:
        return Part() if self.part in (None, PREPARE) else Part.parse(self.part)

    @property
    def unit_bytes(self) -> int:
        return max(1, int(self.unit_mib * 2**20))

    def settings(self) -> dict[str, Any]:
        """What the output follows from, as JSON. Workers and parts are not in it."""
        config = {
            "tokenizer": self.tokenizer.describe(),
            "val_fraction": self.val_fraction,
            "unit_mib": self.unit_mib,
        }
        return json.loads(json.dumps({"corpus": self.corpus.describe(), "config": config}))


@dataclass
class Tally:
    """The units as they are done."""

    records: list[UnitRecord] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)

    def manifest(self, tokenizer: Tokenizer, settings: dict[str, Any]) -> Manifest:
        records = sorted(self.records, key=lambda record: record.index)
        entries = [entry for record in records for entry in record.files]
        digest = digest_of("".join(record.digest for record in records).encode()).hex()
        corpus = {**settings["corpus"], "digest": digest, "skipped": len(self.skipped)}
        files = tuple(sorted(entries, key=lambda entry: entry.split))  # stable: train, then val, in corpus order
        return Manifest(FORMAT_VERSION, tokenizer.fingerprint, tokenizer.vocab_size, corpus, settings["config"], files)

    def rate(self, seconds: float) -> str:
        """For the end of a report; nothing where all units were there already."""
        megabytes = sum(record.text_bytes for record in self.records if not record.kept) / 1e6
        return f", {megabytes / seconds:.1f} MB/s" if megabytes else ""


def tokenize(config: TokenizeConfig, out: Path) -> None:
    """Tokenise the corpus, or one part of it, into `out`; prints what it does. Raises DataError or OSError."""
    output = output_of(config, out)
    if manifest := output.finished():
        print(f"already done, nothing changed: {summary(out, manifest)}")
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
    """Every unit that is not there yet, and the manifest."""
    with prepared(config, output) as tokenizer:
        start = time.perf_counter()
        tally = encode(config, output.folder)
        manifest = tally.manifest(tokenizer, output.settings)
        warn_of(tally, manifest, config.val_fraction)
        output.finish(manifest)
    print(f"done: {summary(output.folder, manifest)}{tally.rate(time.perf_counter() - start)}")


def tokenize_part(config: TokenizeConfig, output: Output) -> None:
    """The part's units alone. Parts run beside each other, on any machines that share the folder."""
    with output.joined():
        start = time.perf_counter()
        tally = encode(config, output.folder)
    done = sum(not record.kept for record in tally.records)
    print(
        f"part {config.part} of {output.folder}: {done} units done,"
        f" {len(tally.records) - done} were there{tally.rate(time.perf_counter() - start)}"
    )


@contextmanager
def prepared(config: TokenizeConfig, output: Output) -> Iterator[Tokenizer]:
    """Hold the folder for this run alone, with its settings and its tokenizer in it."""
    ensure_documents(config.corpus)
    tokenizer = tokenizer_for(config, output)
    with output.started():
        if not output.has_tokenizer:
            tokenizer.save(output.folder / TOKENIZER_FOLDER)
        yield tokenizer


def tokenizer_for(config: TokenizeConfig, output: Output) -> Tokenizer:
    """The tokenizer of the run that was cut off here, or a new one."""
    if output.has_tokenizer:
        return Tokenizer.load(output.folder / TOKENIZER_FOLDER)
    start = time.perf_counter()
    tokenizer = config.tokenizer.build(lambda: training_texts(config))
    if isinstance(config.tokenizer, BpeTokenizer):
        seconds, wanted = time.perf_counter() - start, config.tokenizer.vocab_size
        print(f"trained a BPE of {tokenizer.vocab_size:,} rows in {seconds:.0f} s")
        if tokenizer.vocab_size < wanted:
            print(f"note: the corpus has no pairs for the {wanted:,} rows of tokenizer.vocab_size")
    return tokenizer


def training_texts(config: TokenizeConfig) -> Iterator[str]:
    """The documents that are not for validation: the tokenizer must not have seen those."""
    for text in config.corpus.documents([]):
        if split_of(digest_of(text.encode()), config.val_fraction) == "train":
            yield text


def ensure_documents(corpus: CorpusConfig) -> None:
    """DataError where the corpus is empty, or cannot be read from the start: before anything is written."""
    if next(iter(corpus.documents([])), None) is None:
        raise DataError(f"the corpus ({corpus.kind}) is empty: it has no document with text")


def encode(config: TokenizeConfig, out: Path) -> Tally:
    """The units of this run or part, with a progress bar in bytes of text."""
    tally, tokens = Tally(), 0
    texts = config.corpus.documents(tally.skipped)
    job = EncodeJob(out, config.val_fraction)
    records = encode_corpus(texts, job, config.unit_bytes, config.processes, config.units)
    total = config.corpus.text_bytes()
    with progress_bar(total and total // config.units.count) as bar:
        for record in records:
            tally.records.append(record)
            tokens += record.tokens
            bar.update(record.text_bytes)
            bar.set_postfix_str(f"{tokens / 1e6:.1f}M tokens")
    return tally


def progress_bar(total: int | None) -> "tqdm[Any]":
    return tqdm(total=total, unit="B", unit_scale=True, desc="tokenise", leave=False, disable=None)


def warn_of(tally: Tally, manifest: Manifest, val_fraction: float) -> None:
    """Say what was left out. DataError where there is nothing to train on."""
    if tally.skipped:
        names = ", ".join(tally.skipped[:NAMES_SHOWN])
        more = ", ..." if len(tally.skipped) > NAMES_SHOWN else ""
        print(f"skipped {len(tally.skipped)} documents that do not decode: {names}{more}")
    if not manifest.split("train"):
        raise DataError(f"no document for training: val_fraction={val_fraction} took all of so small a corpus")
    if val_fraction > 0 and not manifest.split("val"):
        print(f"warning: no document for validation: val_fraction={val_fraction} of so small a corpus is none")


def summary(folder: Path, manifest: Manifest) -> str:
    documents, tokens, text_bytes = manifest.totals()
    val_tokens = manifest.totals(["val"])[1]
    return (
        f"{folder}: {documents:,} documents, {tokens:,} tokens ({val_tokens:,} for validation),"
        f" {text_bytes / 1e6:.1f} MB of text, {manifest.vocab_size:,} rows"
    )


def verify_folder(folder: Path) -> int:
    """Print every fault on stderr, or one line that all is well; the exit code."""
    faults = verify(folder)
    for fault in faults:
        print(f"fault: {fault}", file=sys.stderr)
    if faults:
        print(f"{folder}: {len(faults)} faults", file=sys.stderr)
        return EXIT_FAULTS
    print(f"ok: {summary(folder, Manifest.load(folder))}")
    return 0


def register() -> None:
    """Hand the dataclasses to Hydra: the schema and the options of each group."""
    store = ConfigStore.instance()
    store.store(name="tokenize_schema", node=TokenizeConfig)
    for corpus in (StdlibCorpus, FilesCorpus, HubCorpus):
        store.store(group="corpus", name=corpus.kind, node=corpus)
    for tokenizer in (BpeTokenizer, NamedTokenizer, FileTokenizer):
        store.store(group="tokenizer", name=tokenizer.kind, node=tokenizer)


def run(composed: DictConfig) -> int:
    """The exit code of the whole program."""
    try:
        return execute(config_of(composed))
    except (DataError, OmegaConfBaseException) as error:
        return fail(headline(error))


def config_of(composed: DictConfig) -> TokenizeConfig:
    """DataError or OmegaConf's own where it is not right."""
    if missing := OmegaConf.missing_keys(composed):
        raise DataError(f"{', '.join(sorted(missing))} must be given")
    config = OmegaConf.to_object(composed)
    assert isinstance(config, TokenizeConfig)
    refuse_unknown_keys(config)
    return config


def execute(config: TokenizeConfig) -> int:
    """Do what the settings say; the exit code."""
    try:
        if config.verify is not None:
            return verify_folder(Path(config.verify))
        assert config.out is not None
        tokenize(config, Path(config.out))
        return 0
    except DataError as error:
        return fail(headline(error))
    except OSError as error:
        return fail(f"{error}; finished units are kept, and the same command does the rest")
    except KeyboardInterrupt:
        fail("interrupted; finished units are kept, and the same command does the rest")
        return EXIT_INTERRUPTED


def refuse_unknown_keys(config: TokenizeConfig) -> None:
    """DataError for keys that Hydra's +key=value has put beside the dataclasses' own."""
    for prefix, part in (("", config), ("corpus.", config.corpus), ("tokenizer.", config.tokenizer)):
        known = [item.name for item in fields(part)]
        for key in vars(part).keys() - known:
            raise DataError(
                f"unknown key {prefix}{key}; there are {', '.join(prefix + name for name in known) or 'none'}"
            )


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="tokenize")
def _composed(config: DictConfig) -> None:
    sys.exit(run(config))


def main() -> None:
    """Parse the command line and run; exits 0, 1 (verify found faults), or 2 (an error, in one line)."""
    register()
    run_hydra(_composed)
