"""Corpora of a real S3 server on loopback: the same batches as from the disk, and one clear error for each fault."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import DataError
from pretrain.commands.data import main as show_batch
from pretrain.config.job import JobConfig
from pretrain.corpora import check_room, samples
from pretrain.data import PackedWindows, Windows, blocks, dataset, loader, open_corpus, open_data, remote
from tests.data_prep.test_web import RangesHandler
from tests.in_process import in_process
from tests.object_store import Store
from tests.pretrain.data.test_show import batches_of
from tests.pretrain.helpers import TIMES, make_corpus
from tests.pretrain.tiny import VOCAB, tiny_config, train_rank
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[3]
SMALL_BLOCK = 512  # bytes: each token file has eight
READ_ALL = f"""
from pretrain.data import blocks, open_corpus
blocks.BLOCK, blocks.THREADS = {SMALL_BLOCK}, 2
for file in open_corpus("URL", cache="CACHE").train:
    file.tokens
"""


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    with Store() as store, pytest.MonkeyPatch.context() as patch:
        for key, value in (store.environment | {"AWS_MAX_ATTEMPTS": "1"}).items():
            patch.setenv(key, value)
        yield store


@pytest.fixture
def store(server: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """The server, with small blocks on the client's side."""
    monkeypatch.setattr(blocks, "BLOCK", SMALL_BLOCK)
    monkeypatch.setattr(blocks, "FIRST_PAUSE", 0.01)
    server.reads.clear()
    yield server
    server.delay, server.broken = 0.0, lambda key: False


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return make_corpus(tmp_path / "local")


@pytest.fixture
def url(store: Store, local: Path) -> str:
    return store.upload(local, f"corpus-{local.parent.name}")


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def token_reads(store: Store) -> dict[tuple[str, str], int]:
    return {read: times for read, times in store.reads.items() if read[0].endswith(".bin")}


def reopened(url: str, cache: str) -> dataset.Corpus:
    """Opens the corpus as another process would."""
    remote._open.clear()
    return open_corpus(url, cache=cache)


@pytest.mark.parametrize("kind", ["causal", "masked", "packed"])
def test_windows_match_those_of_the_disk(store, local, url, cache, kind):
    of_disk, of_store = open_corpus(local), open_corpus(url, cache=cache)
    assert of_store.name == of_disk.name
    assert of_store.tokenizer_fingerprint == of_disk.tokenizer_fingerprint
    assert not token_reads(store)  # nothing waits for the whole corpus
    for split in ("train", "val"):
        files = getattr(of_disk, split), getattr(of_store, split)
        ours, theirs = (
            PackedWindows(some, 32) if kind == "packed" else Windows(some, 32, masked=kind == "masked")
            for some in files
        )
        assert len(ours) == len(theirs)
        for index in np.random.default_rng(0).permutation(len(ours)).tolist():
            for mine, other in zip(ours[index], theirs[index], strict=True):
                assert np.array_equal(mine, other)
    assert sum(token_reads(store).values()) == len(token_reads(store)) == 8 + 8 + 3


@pytest.mark.parametrize("protocol", ["file", "http"])
def test_other_protocols_are_read(local, cache, monkeypatch, protocol):
    monkeypatch.setattr(blocks, "BLOCK", SMALL_BLOCK)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(RangesHandler, directory=str(local)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"file://{local}" if protocol == "file" else f"http://127.0.0.1:{server.server_port}"
        corpus, of_disk = open_corpus(url, cache=cache), open_corpus(local)
        assert corpus.name == of_disk.name
        for ours, theirs in zip(corpus.train, of_disk.train, strict=True):
            assert np.array_equal(ours.read(300, 700), theirs.read(300, 700))
        assert corpus.cache.missing
    finally:
        server.shutdown()
        server.server_close()


def train_from_store(rank: int, world: int, environment: dict[str, str], config: JobConfig) -> None:
    os.environ.update(environment)
    blocks.BLOCK = SMALL_BLOCK
    train_rank(rank, world, config)


def scalars(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def test_training_matches_the_disk_and_resumes_from_it(store, local, url, cache, tmp_path):
    common = {"data__cache": cache, "train__steps": 8, "eval__every": 4, "vocab__size": VOCAB, "checkpoint__keep": 3}
    for run, corpus, last in (("disk", local, 8), ("store", url, 4), ("store", local, 8)):
        config = tiny_config(corpus, tmp_path / run, **common, train__stop_after=last)
        config.data.path = str(corpus)
        run_ranks(2, train_from_store, store.environment, config)
    of_disk, of_store = scalars(tmp_path / "disk"), scalars(tmp_path / "store")
    assert [line["loss"] for line in of_disk if "loss" in line] == [line["loss"] for line in of_store if "loss" in line]
    assert [line for line in of_disk if "val_loss" in line] == [line for line in of_store if "val_loss" in line]
    assert max(token_reads(store).values()) == 1  # both ranks read the windows of both: one of them fetches


def test_show_reads_a_store(store, local, url, cache):
    arguments = ["show", "vocab.size=null", "train.global_batch=4", "train.micro_batch=1", "model.context=32"]
    of_store = in_process(show_batch, *arguments, f"data.path={url}", f"data.cache={cache}")
    of_disk = in_process(show_batch, *arguments, f"data.path={local}")
    assert of_store.returncode == of_disk.returncode == 0, of_store.stderr
    assert of_store.stdout.replace(url, "CORPUS") == of_disk.stdout.replace(str(local), "CORPUS")


def test_loader_fetches_ahead_of_the_batches(store, local, url, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "LOOK_AHEAD", 6)
    config = tiny_config(local, tmp_path / "run", train__global_batch=2, train__micro_batch=2)
    config.data.path, config.data.cache = url, cache
    data = open_data(config.data)
    blocks_of = data.corpora[url].cache
    order = [
        (file, low, high)
        for windows, index in samples(config, data).next({}, 2 * 6)
        for file, low, high in windows._reads(index)
    ]
    batches_of(config, 0, 1, 1)
    late = time.monotonic() + 30
    while blocks_of._pending and time.monotonic() < late:
        time.sleep(0.01)
    store.broken = lambda key: True
    for file, low, high in order:
        assert len(file.read(low, high)) == high - low
    assert blocks_of.missing  # not the whole corpus


def test_killed_fetch_is_resumed(store, local, url, cache):
    store.delay = 0.05
    code = READ_ALL.replace("URL", url).replace("CACHE", cache)
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as process:
        late = time.monotonic() + 60
        while len(token_reads(store)) < 5 and time.monotonic() < late:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    time.sleep(0.3)  # the server answers those on their way
    store.delay = 0.0
    before = token_reads(store)
    assert 5 <= len(before) < 16
    corpus = open_corpus(url, cache=cache)
    for ours, theirs in zip(corpus.train, open_corpus(local).train, strict=True):
        assert np.array_equal(ours.tokens, theirs.tokens)
    again = [read for read, times in token_reads(store).items() if times > 1]
    assert len(again) <= 2  # those that were on their way
    assert set(again) <= set(before)
    assert corpus.cache is not None and corpus.cache.missing == corpus.cache.size - sum(
        f.size * 2 for f in corpus.train
    )


def test_damaged_block_is_fetched_again(store, local, url, cache):
    corpus = open_corpus(url, cache=cache)
    places = 0, 5 * SMALL_BLOCK // 2  # a whole file would be compared with its hash, perhaps after the damage
    right = corpus.train[0].read(*places).copy()
    with open(corpus.train[0].prefix.with_suffix(".bin"), "r+b") as file:
        file.seek(2 * SMALL_BLOCK + 7)
        file.write(b"\xff" * 9)
    assert np.array_equal(reopened(url, cache).train[0].read(*places), right)
    assert sorted(token_reads(store).values()) == [1] * 4 + [2]


def test_new_content_has_its_own_folder(store, url, cache, tmp_path):
    first = open_corpus(url, cache=cache)
    store.upload(make_corpus(tmp_path / "other", train=4100), url.rpartition("/")[2])
    second = reopened(url, cache)
    assert first.train[0].prefix.parent != second.train[0].prefix.parent
    assert (first.tokens, second.tokens) == (4000, 4100)


def test_change_after_the_start_is_an_error(store, local, url, cache):
    corpus = open_corpus(url, cache=cache)
    corpus.train[0].read(0, 10)
    name = url.rpartition("/")[2]
    store.put(f"{name}/train-00000.bin", (local / "train-00000.bin").read_bytes()[::-1])
    assert np.array_equal(corpus.train[0].read(0, 10), open_corpus(local).train[0].read(0, 10))
    with pytest.raises(DataError, match=f"{url}/train-00000.bin has changed in the store"):
        corpus.train[0].read(1000, 1010)


def test_lost_connection_is_retried_and_then_named(store, local, url, cache, monkeypatch):
    corpus, failures = open_corpus(url, cache=cache), iter([True] * 3)
    store.broken = lambda key: next(failures, False)
    assert np.array_equal(corpus.train[0].read(0, 300), open_corpus(local).train[0].read(0, 300))
    monkeypatch.setattr(blocks, "GIVE_UP_SECONDS", 0.2)
    store.broken = lambda key: True
    with pytest.raises(ConnectionError, match=rf"{url}/train-00001.bin: cannot be read for 0.2 s: .*resumes the run"):
        corpus.train[1].read(0, 10)
    store.broken = lambda key: False
    assert len(corpus.train[1].read(0, 10)) == 10


def test_whole_file_is_compared_with_its_hash(store, local, url, cache):
    damaged = bytearray((local / "train-00000.bin").read_bytes())
    damaged[2000:2002] = b"\x01\x01"
    store.put(f"{url.rpartition('/')[2]}/train-00000.bin", bytes(damaged))
    for corpus in (open_corpus(url, cache=cache), reopened(url, cache)):
        with pytest.raises(DataError, match=r"train-00000.bin: its sha256 does not match the manifest"):
            for _ in range(500):  # the threads read the whole file after its last block
                corpus.train[0].tokens  # noqa: B018
                time.sleep(0.01)


def test_cache_without_room_is_refused(store, url, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1 << 30, 1 << 30, 4096))
    config = tiny_config(tmp_path, tmp_path / "run", data__cache=cache, train__steps=1)
    config.data.path = url
    data = open_data(config.data)
    with pytest.raises(ValueError, match=rf"data.cache={cache} must have room for 0.0 GiB of {url}, but has 0.0"):
        check_room(config, data, 1.0)
    second = store.upload(make_corpus(tmp_path / "b", train=4002), "second")
    config.data.path, config.data.corpora, config.train.steps = "", {"a": url, "b": second}, 1000
    both = open_data(config.data)
    for size, fits in ((18_000, False), (19_000, True)):  # each takes 9.2 kB
        monkeypatch.setattr(shutil, "disk_usage", lambda folder, size=size: shutil._ntuple_diskusage(0, 0, size))
        with nullcontext() if fits else pytest.raises(ValueError, match=f"of {url}, {second}, but has"):
            check_room(config, both, 1.0)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(1 << 30, 1 << 30, 4096))
    config.data.path, config.data.corpora, config.train.steps = url, {}, 1
    check_room(config, data, 0.0)  # nothing is read here
    for file in (*data.corpora[url].train, *data.corpora[url].val):
        file.tokens  # noqa: B018
    check_room(config, data, 1.0)  # all is there


def faulty(fault: str, store: Store, local: Path, url: str) -> str:
    """Makes a folder in the store faulty, and returns what the error must say."""
    name = url.rpartition("/")[2]
    if fault == "size":
        store.put(f"{name}/train-00001.bin", b"1234")
        return r": train-00001.bin has 4 bytes, but the manifest says 4000"
    if fault == "index":
        store.put(f"{name}/val-00000.idx", b"\0" * (local / "val-00000.idx").stat().st_size)
        return r"/val-00000.idx: its sha256 does not match the manifest"
    store.put(f"{name}/manifest.json", b"{}")
    return r"/manifest.json is not a manifest: KeyError"


@pytest.mark.parametrize("fault", ["size", "index", "manifest"])
def test_faulty_folder_is_refused(store, local, url, cache, fault):
    said = faulty(fault, store, local, url)
    with pytest.raises(DataError, match=re.escape(url) + said):
        open_corpus(url, cache=cache)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (
            "s3://corpora/none",
            "data.path=s3://corpora/none: manifest.json is missing: it must be a folder of token files",
        ),
        ("s3://no-bucket/a", "data.path=s3://no-bucket/a: manifest.json is missing"),
        ("nothing://a/b", "data.path=nothing://a/b cannot be read: Protocol not known: nothing"),
    ],
)
def test_wrong_url_is_refused(store, cache, path, said):
    with pytest.raises(ValueError, match=said):
        open_corpus(path, cache=cache)


def test_missing_token_file_is_refused(store, local, cache):
    (local / "train-00001.idx").unlink()
    url = store.upload(local, f"lacking-{local.parent.name}")
    with pytest.raises(DataError, match=f"data.path={url}: train-00001.idx is missing: upload the folder again"):
        open_corpus(url, cache=cache)


def test_missing_package_is_named(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(DataError, match=r"gs://a/b: needs a package that is not installed: pip install gcsfs"):
        open_corpus("gs://a/b", cache=cache)


def test_cache_must_be_a_folder_of_the_node(store, url, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=f"data.cache={tmp_path}/file: {tmp_path}/file must be a folder, but is a file"):
        open_corpus(url, cache=f"{tmp_path}/file")
    with pytest.raises(DataError, match=r"data.cache=\$NO_SUCH_DISK/x must have variables that this node knows"):
        open_corpus(url, cache="$NO_SUCH_DISK/x")
    monkeypatch.setenv("SLURM_TMPDIR", str(tmp_path))
    assert remote.cache_folder("") == tmp_path / "rowshard"
