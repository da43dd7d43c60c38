"""Tests files on web servers: with ranges, without ranges, and without HEAD."""

import gzip
import importlib
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from data_prep import source
from data_prep.corpus import FilesCorpus
from data_prep.errors import DataError
from data_prep.source import Document, expand
from tests.data_prep.commands import write_jsonl

ROWS = [f"row {number}" for number in range(50)]


class Handler(SimpleHTTPRequestHandler):
    """Python's own handler, which does not support ranges."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass


class RangesHandler(Handler):
    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted or not path.is_file():
            super().do_GET()
            return
        data, start = path.read_bytes(), int(wanted[1])
        part = data[start : int(wanted[2]) + 1 if wanted[2] else None]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)


class PresignedHandler(RangesHandler):
    """Answers as S3 does for an address that was signed for GET."""

    def do_HEAD(self) -> None:
        self.send_error(403)


class NoHeadHandler(Handler):
    def do_HEAD(self) -> None:
        self.send_error(405)


class SilentHandler(Handler):
    """Announces a length, and then sends nothing."""

    def copyfile(self, *arguments: object) -> None:
        time.sleep(5)


Serve = Callable[[type[Handler]], str]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """A function that serves tmp_path and returns the address."""
    servers = []

    def start(handler: type[Handler]) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path)))
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def texts(corpus: FilesCorpus, unit_bytes: int = 100) -> list[str]:
    items = [item for unit in corpus.units(unit_bytes) for item in corpus.items(unit, 1 << 20)]
    return [item.text for item in items if isinstance(item, Document)]


@pytest.mark.parametrize("handler", [Handler, RangesHandler, PresignedHandler, NoHeadHandler])
def test_web_files_match_local_files(tmp_path: Path, serve: Serve, handler: type[Handler]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    (tmp_path / "c.txt").write_text("x")
    address = serve(handler)
    corpus = FilesCorpus([f"{address}/{name}?signed=a.b" for name in ("a.jsonl", "b.jsonl.gz", "c.txt")])
    assert texts(corpus) == [*ROWS, *ROWS, "x"]
    assert corpus.describe()["bytes"] == sum(file.stat().st_size for file in tmp_path.iterdir())
    ranged = issubclass(handler, RangesHandler)
    assert [file.ranged for file in expand(corpus.paths)] == [ranged, ranged, False]
    assert (len(corpus.units(100)) > 10) == ranged


@pytest.mark.parametrize("handler", [Handler, PresignedHandler])
def test_parquet_needs_ranges(tmp_path: Path, serve: Serve, handler: type[Handler]) -> None:
    pyarrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ROWS}), tmp_path / "a.parquet")
    corpus = FilesCorpus([f"{serve(handler)}/a.parquet"])
    if issubclass(handler, RangesHandler):
        assert texts(corpus) == ROWS
    else:
        with pytest.raises(DataError, match=r"a\.parquet: cannot be read: "):
            texts(corpus)


def test_web_glob_lists_the_files(tmp_path: Path, serve: Serve) -> None:
    """The server's listing of a folder has no sizes."""
    for name in ("a.jsonl", "b.jsonl"):
        write_jsonl(tmp_path / name, ROWS)
    corpus = FilesCorpus([f"{serve(RangesHandler)}/*.jsonl"])
    assert texts(corpus) == ROWS * 2 and len(corpus.units(100)) > 10


def test_missing_or_silent_web_file_is_named(tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl' matches no file"):
        expand([f"{serve(Handler)}/nothing.jsonl"])
    monkeypatch.setattr(source, "HTTP_SECONDS", 0.5)
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read: \w*Timeout"):
        texts(FilesCorpus([f"{serve(SilentHandler)}/a.jsonl"]))


@pytest.mark.parametrize(("address", "package"), [("http://127.0.0.1:9/a.txt", "aiohttp"), ("gs://bucket/a", "gcsfs")])
def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, address: str, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "fsspec.implementations.http", raising=False)
    with pytest.raises(DataError, match=rf"^{address}: needs a package that is not installed: pip install {package}$"):
        expand([address])
