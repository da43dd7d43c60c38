"""Tests the command: every way to start it, its output, crashes and errors. Real processes, real files."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from data_prep.corpus import FilesCorpus
from data_prep.source import Document
from data_prep.token_file import Manifest, TokenFile
from data_prep.tokenizer import Tokenizer
from data_prep.verify import verify
from tests.data_prep.commands import (
    ROOT,
    SCRIPT,
    assert_one_error,
    folder_bytes,
    python,
    small_spec,
    texts,
    tokenize,
    tokenize_here,
    write_jsonl,
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, text_folder: Path, spec_folder: Path) -> Path:
    """The output of one uninterrupted run with one worker."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    done = tokenize(
        "corpus=files",
        f"corpus.paths=['{text_folder}']",
        "tokenizer=file",
        f"tokenizer.path={spec_folder}",
        "unit_mib=0.05",
        "workers=1",
        f"out={out}",
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    assert last.startswith(f"done: {out}: 200 documents, ") and last.endswith(" MB/s")
    assert done.stderr == ""
    return out


def test_tokens_decode_to_the_documents(undisturbed: Path, text_folder: Path) -> None:
    manifest, tokenizer = Manifest.load(undisturbed), Tokenizer.load(undisturbed / "tokenizer")
    assert len(manifest.split("train")) > 3 and manifest.split("val")
    assert manifest.tokenizer_fingerprint == tokenizer.fingerprint
    found: dict[str, list[str]] = {"train": [], "val": []}
    for entry in manifest.files:
        file = TokenFile(undisturbed / entry.name)
        documents = np.split(file.tokens, np.cumsum(file.lengths)[:-1])
        assert all(ids[-1] == tokenizer.end_of_document for ids in documents)
        decoded = [tokenizer.decode(ids[:-1]) for ids in documents]
        assert sum(len(text.encode()) for text in decoded) == entry.text_bytes
        found[entry.split] += decoded
    corpus = [
        document.text for document in FilesCorpus([str(text_folder)]).documents() if isinstance(document, Document)
    ]
    assert found["train"] == [text for text in corpus if text not in found["val"]]
    assert sorted(found["train"] + found["val"]) == sorted(corpus)
    assert not (undisturbed / "unfinished").exists() and verify(undisturbed) == []


def run_in_every_way(way: str, tmp_path: Path) -> tuple[list[str], Path]:
    """Yields the arguments of Python, and the current folder."""
    if way == "path":
        return ["data_prep/tokenize.py"], ROOT
    if way == "module":
        return ["-m", "data_prep.tokenize"], ROOT
    if way == "inside":
        return ["tokenize.py"], ROOT / "data_prep"
    if way == "elsewhere":
        return [str(SCRIPT)], tmp_path
    link = tmp_path / "link.py"
    link.symlink_to(SCRIPT)
    return [str(link)], tmp_path


@pytest.mark.parametrize("way", ["path", "module", "inside", "elsewhere", "symlink"])
def test_command_starts_in_every_way(way: str, tmp_path: Path, command: list[str], undisturbed: Path) -> None:
    start, folder = run_in_every_way(way, tmp_path)
    before = set(folder.iterdir())
    done = python(*start, *command, f"out={tmp_path / 'out'}", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert folder_bytes(tmp_path / "out") == folder_bytes(undisturbed)
    assert set(folder.iterdir()) - before <= {tmp_path / "out"}  # Hydra leaves no files


@pytest.mark.parametrize("method", ["spawn", "fork", "forkserver"])
def test_command_runs_with_every_start_method(
    method: str, tmp_path: Path, command: list[str], undisturbed: Path
) -> None:
    driver = (
        "import multiprocessing, runpy, sys\n"
        "get_context = multiprocessing.get_context\n"
        f"multiprocessing.get_context = lambda method=None: get_context({method!r})\n"
        f"sys.argv[0] = {str(SCRIPT)!r}\n"
        f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    done = python("-c", driver, *command, f"out={tmp_path / 'out'}", cwd=ROOT / "data_prep")
    assert done.returncode == 0, done.stderr
    assert folder_bytes(tmp_path / "out") == folder_bytes(undisturbed)


def test_standard_tokenize_is_importable() -> None:
    code = "import tokenize, inspect, linecache; print(tokenize.detect_encoding, tokenize.__file__)"
    done = python("-c", code, cwd=ROOT / "data_prep")
    assert done.returncode == 0 and "data_prep" not in done.stdout, done.stderr
    done = python("-c", "import torch; print(torch.ones(1))", cwd=ROOT / "data_prep")
    assert done.returncode == 0, done.stderr


def test_second_run_reports_already_done(tmp_path: Path, command: list[str], undisturbed: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")}
    done = tokenize_here(*command, f"out={undisturbed}")
    assert done.returncode == 0 and done.stdout.startswith("already done"), done
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*")} == before


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("unit_mib=1", ["config.unit_mib is 0.05 there, 1.0 now", "nothing was overwritten"]),
        ("corpus.text_key=body", ["corpus.text_key"]),
        ("tokenizer.path={other}", ["config.tokenizer.fingerprint"]),
    ],
)
def test_other_settings_overwrite_nothing(
    change: str, parts: list[str], tmp_path: Path, command: list[str], undisturbed: Path
) -> None:
    small_spec(("ab",)).save(tmp_path)
    before = folder_bytes(undisturbed)
    done = tokenize_here(*command, change.format(other=tmp_path), f"out={undisturbed}")
    assert_one_error(done, str(undisturbed), *parts)
    assert folder_bytes(undisturbed) == before


def test_folder_with_other_files_is_not_touched(tmp_path: Path, command: list[str]) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    assert_one_error(tokenize(*command, f"out={tmp_path}"), "has other files in it")
    assert folder_bytes(tmp_path) == {"thesis.tex": b"x"}


def test_killed_run_resumes(tmp_path: Path, spec_folder: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts(1500))
    command = [
        "corpus=files",
        f"corpus.paths=['{tmp_path / 'a.jsonl'}']",
        "tokenizer=file",
        f"tokenizer.path={spec_folder}",
        "unit_mib=0.02",
    ]
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *command, "workers=2", f"out={out}"],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: len(list(out.glob("unfinished/0*.json"))) >= 5)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=10)
    assert not (out / "manifest.json").exists()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("unfinished/0*.json")}
    finished = {path: path.stat().st_mtime_ns for record in kept for path in out.glob(f"*-{record.stem}.bin")}
    (out / "train-99999.bin.tmp-1").write_bytes(b"left over")

    assert tokenize(*command, "workers=1", f"out={out}").returncode == 0
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert tokenize(*command, "workers=3", f"out={tmp_path / 'straight'}").returncode == 0
    assert folder_bytes(out) == folder_bytes(tmp_path / "straight")
    assert verify(out) == []


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_workers_end_with_a_killed_parent_and_a_killed_worker_is_one_error(tmp_path: Path, spec_folder: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", texts(3000))
    arguments = [f"corpus.paths=['{tmp_path / 'a.jsonl'}']", f"tokenizer.path={spec_folder}", "unit_mib=0.02"]

    def start(out: Path) -> tuple[subprocess.Popen[str], list[int]]:
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), "corpus=files", "tokenizer=file", *arguments, f"out={out}"],
            start_new_session=True,
            stderr=subprocess.PIPE,
            text=True,
        )
        wait_for(lambda: len(list(out.glob("unfinished/0*.json"))) >= 5)
        return process, workers_of(process.pid)

    process, workers = start(tmp_path / "one")
    os.kill(workers[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 2 and errors.count("\n") == 1 and "a worker process was killed" in errors

    process, workers = start(tmp_path / "two")
    process.kill()
    process.wait(timeout=10)
    wait_for(lambda: not any(Path(f"/proc/{worker}/cwd").exists() for worker in workers))


def workers_of(parent: int) -> list[int]:
    """The process ids of the pool's workers: the children of the fork server."""

    def children(process: int) -> list[int]:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]

    (server,) = (c for c in children(parent) if b"forkserver" in Path(f"/proc/{c}/cmdline").read_bytes())
    return children(server)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "rowshard-test", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, timeout=10).returncode != 0:
        pytest.skip("a small file system needs the right to mount one")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True, timeout=10)


def test_full_disk_keeps_finished_units(small_disk: Path, command: list[str], undisturbed: Path) -> None:
    out = small_disk / "out"
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 120_000)
    assert_one_error(tokenize(*command, f"out={out}"), "No space left on device", "finished units are kept")
    assert not (out / "manifest.json").exists() and not list(out.rglob("*.tmp-*"))
    expected = folder_bytes(undisturbed)
    kept = {name: data for name, data in folder_bytes(out).items() if name.endswith((".bin", ".idx"))}
    assert kept and all(expected[name] == data for name, data in kept.items())  # no partial file

    subprocess.run(["mount", "-o", "remount,size=2m", str(small_disk)], check=True, timeout=10)
    assert tokenize(*command, f"out={out}").returncode == 0
    assert folder_bytes(out) == expected


def test_bad_documents_are_quarantined_up_to_the_limit(tmp_path: Path, spec_folder: Path) -> None:
    good, path = texts(60), tmp_path / "a.jsonl"
    lines = [json.dumps({"text": text}).encode() for text in good]
    lines[10:10] = [b'{"text": "bad \xff"}']
    lines[30:30] = [b'{"text": 7}', b'{"text": "' + b"x" * 200_000 + b'"}']
    path.write_bytes(b"\n".join(lines) + b"\n")
    command = ["corpus=files", f"corpus.paths=['{path}']", "tokenizer=file", f"tokenizer.path={spec_folder}"]
    command += ["unit_mib=0.01", "max_document_mib=0.1"]
    out = tmp_path / "out"
    assert_one_error(tokenize(*command, f"out={out}", "max_quarantined=2"), "more than max_quarantined=2", "not UTF-8")
    assert not (out / "manifest.json").exists() and list(out.glob("unfinished/0*.json"))
    done = tokenize(*command, f"out={out}", "max_quarantined=3")
    assert done.returncode == 0 and "quarantined 3 documents, see quarantine.jsonl" in done.stdout, done
    offsets = [sum(len(line) + 1 for line in lines[:number]) for number in (10, 30, 31)]
    quarantined = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in quarantined] == [f"{path}:{offset}" for offset in offsets]
    reasons = ["not UTF-8 (byte 0xff after 14 bytes)", "'text' must be text, not int"]
    assert [entry["reason"] for entry in quarantined] == [*reasons, "more than 104,857 bytes (max_document_mib)"]
    manifest = Manifest.load(out)
    assert manifest.totals()[0] == 60 and manifest.corpus["quarantined"] == 3 and verify(out) == []
    assert tokenize(*command, f"out={tmp_path / 'straight'}", "workers=1").returncode == 0
    assert folder_bytes(out) == folder_bytes(tmp_path / "straight")


def test_undecodable_file_name_is_printed(tmp_path: Path, spec_folder: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "good.txt").write_text("good")
    Path(os.fsdecode(bytes(folder) + b"/na\xefve.txt")).write_bytes(b"na\xefve")
    command = ["corpus=files", f"corpus.paths=['{folder}']", "tokenizer=file", f"tokenizer.path={spec_folder}"]
    done = tokenize(*command, "val_fraction=0", f"out={tmp_path / 'out'}", PYTHONIOENCODING="utf-8:strict")
    assert done.returncode == 0 and "na\\udcefve.txt: not UTF-8" in done.stdout, done


def test_repaired_file_is_accepted_after_a_failed_run(tmp_path: Path, spec_folder: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(10):
        write_jsonl(folder / f"{number}.jsonl", texts(10, seed=number))
    whole = gzip.compress(json.dumps({"text": random.Random(0).randbytes(100_000).hex()}).encode())
    (folder / "9.jsonl.gz").write_bytes(whole[:-100])  # its beginning, which is inspected before the run, is intact
    command = ["corpus=files", f"corpus.paths=['{folder}']", "tokenizer=file", f"tokenizer.path={spec_folder}"]
    command += ["unit_mib=0.002", "workers=1", f"out={tmp_path / 'out'}"]
    assert_one_error(tokenize(*command), "9.jsonl.gz: cannot be read")
    assert list((tmp_path / "out").glob("unfinished/0*.json"))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.bin")}
    (folder / "9.jsonl.gz").write_bytes(gzip.compress(b'{"text": "good"}'))
    assert tokenize(*command).returncode == 0
    kept = [path for path, time in before.items() if path.exists() and path.stat().st_mtime_ns == time]
    assert len(kept) > len(before) / 2  # all except the last, smaller ones
    assert Manifest.load(tmp_path / "out").totals()[0] == 101 and verify(tmp_path / "out") == []


ERRORS = {
    "wrong key": (["tokenizer.vocabsize=300"], ["vocabsize", "vocab_size"]),
    "wrong key, added": (["+corpus.foo=1"], ["unknown key corpus.foo"]),
    "wrong key, added to clean": (["+clean.foo=1"], ["unknown key clean.foo", "clean.min_bytes"]),
    "wrong key at the top": (["batch=1"], ["unknown key batch;", "val_fraction"]),
    "wrong type": (["tokenizer.vocab_size=many"], ["tokenizer.vocab_size=many must be a whole number"]),
    "wrong value": (["tokenizer.vocab_size=256"], ["tokenizer.vocab_size=256 must be at least 257"]),
    "wrong fraction": (["val_fraction=1"], ["val_fraction=1.0 must be in [0, 1)"]),
    "wrong unit": (["unit_mib=0"], ["unit_mib=0.0 must be positive"]),
    "endless unit": (["unit_mib=inf"], ["unit_mib=inf must be positive and finite"]),
    "endless document": (["max_document_mib=inf"], ["max_document_mib=inf must be positive and finite"]),
    "endless sample": (["tokenizer.sample_mib=inf"], ["tokenizer.sample_mib=inf must be positive and finite"]),
    "wrong limit": (["max_quarantined=-1"], ["max_quarantined=-1 must not be negative"]),
    "wrong lengths": (["clean.min_bytes=9", "clean.max_bytes=8"], ["clean.max_bytes=8 must be at least clean.min"]),
    "unlike nothing": (["clean.deduplicate=true", "clean.exclude=[x]"], ["clean.exclude: x has no documents.digests"]),
    "wrong key below": (["clean.minimum=9"], ["minimum", "min_bytes"]),
    "wrong workers": (["workers=-1"], ["workers=-1"]),
    "wrong option": (["corpus=web"], ["corpus=web must be one of files, fineweb_edu, hub, stdlib"]),
    "unreadable": (["corpus.paths=["], ["cannot read corpus.paths=["]),
    "missing paths": (["corpus=files"], ["corpus.paths must be given"]),
    "no such file": (["corpus=files", "corpus.paths=[/nowhere/x.txt]"], ["'/nowhere/x.txt' matches no file"]),
    "no such tokenizer": (["tokenizer=file", "tokenizer.path=/nowhere"], ["/nowhere is missing"]),
    "URL": (["verify=s3://b/c"], ["verify=s3://b/c must be a folder on the disk"]),
    "out and verify": (["verify=x"], ["out=FOLDER", "verify=FOLDER"]),
    "multirun": (["--multirun"], ["--multirun"]),
    "bad pattern": (["tokenizer.pattern='(('"], ["tokenizer.pattern='((' must be a regular expression"]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_mistake_is_one_line(case: str, tmp_path: Path) -> None:
    arguments, parts = ERRORS[case]
    assert_one_error(tokenize_here(*arguments, f"out={tmp_path / 'out'}", cwd=tmp_path), *parts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tokenizer", ["bpe", "file"])
def test_empty_corpus_is_refused(tokenizer: str, tmp_path: Path, spec_folder: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    chosen = ["tokenizer=bpe"] if tokenizer == "bpe" else ["tokenizer=file", f"tokenizer.path={spec_folder}"]
    done = tokenize_here("corpus=files", f"corpus.paths=['{tmp_path}']", *chosen, f"out={tmp_path / 'out'}")
    assert_one_error(done, "the corpus (files) is empty")
    assert not (tmp_path / "out").exists()


def test_empty_split_is_reported(tmp_path: Path, spec_folder: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    command = [
        "corpus=files",
        f"corpus.paths=['{tmp_path / 'a.txt'}']",
        "tokenizer=file",
        f"tokenizer.path={spec_folder}",
    ]
    done = tokenize(*command, f"out={tmp_path / 'out'}")
    assert done.returncode == 0 and "warning: the validation split is empty" in done.stdout
    done = tokenize(*command, "val_fraction=0.999999", f"out={tmp_path / 'none'}")
    assert_one_error(done, "the training split is empty")


def test_verify_reports_faults(tmp_path: Path, command: list[str]) -> None:
    out = tmp_path / "out"
    assert tokenize(*command, f"out={out}").returncode == 0
    done = tokenize_here(f"verify={out}")
    assert done.returncode == 0 and done.stdout.startswith(f"ok: {out}: 200 documents")
    path = out / "train-00001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    (out / "train-00002.idx").unlink()
    done = tokenize_here(f"verify={out}")
    assert done.returncode == 1 and done.stdout == ""
    assert "train-00001.bin" in done.stderr and "train-00002.idx is missing" in done.stderr
    assert_one_error(tokenize_here(*command, f"out={out}"), "train-00001.bin")  # damaged: not "already done"


def test_stdlib_with_a_trained_tokenizer(tmp_path: Path) -> None:
    command = ["corpus=stdlib", "tokenizer=bpe", "tokenizer.vocab_size=600", "tokenizer.sample_mib=0.5"]
    done = tokenize(*command, f"out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    assert "trained a BPE of 600 rows" in done.stdout
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.vocab_size == 600 and manifest.totals()[2] > 10e6
    assert 0.005 < manifest.totals(["val"])[0] / manifest.totals()[0] < 0.05


def test_help_lists_the_options() -> None:
    done = tokenize("--help")
    assert done.returncode == 0 and "tokenizer: bpe, cl100k_base, file, gpt2" in done.stdout
