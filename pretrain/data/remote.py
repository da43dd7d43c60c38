"""Opens a folder of token files at a URL: s3://BUCKET/FOLDER, and whatever else fsspec reads.

Manifest, tokenizer and indices are fetched whole, and compared with their hashes. The tokens come by blocks, later
(blocks.py). The folder of the cache is named after the URL, the manifest, and the versions of all files in the store:
other content has another folder, so nothing in a folder ever becomes wrong.
"""

import fcntl
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.durable import TEMPORARY_MARK, check_folder, durable
from data_prep.errors import DataError, headline
from data_prep.source import WEB, filesystem, takes_ranges
from data_prep.token_file import MANIFEST_FILE, TOKENIZER_FOLDER, Manifest, token_dtype
from data_prep.tokenizer_spec import RANKS_FILE, SPEC_FILE

from . import blocks
from .blocks import THREADS, BlockCache, RemoteFile, attempted

TOKENIZER_FILES = (f"{TOKENIZER_FOLDER}/{RANKS_FILE}", f"{TOKENIZER_FOLDER}/{SPEC_FILE}")
DEFAULT_CACHES = ("$SLURM_TMPDIR/rowshard", "~/.cache/rowshard")
PIECE_BYTES = 1 << 23  # of an index, fetched at once
VERSIONS = (
    *("ETag", "etag", "md5Hash", "content_md5"),
    *("LastModified", "Last-Modified", "last_modified", "mtime", "created"),
)
REFUSALS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"}
CREDENTIALS = "the store's client takes credentials and address from its own settings (docs/data.md, Object stores)"

_open: dict[tuple[int, Path], BlockCache] = {}  # by process and folder
_opening = threading.Lock()


class _Stored(NamedTuple):
    """A file as the store describes it."""

    size: int
    version: str
    fetch: Callable[[int, int], bytes]


def fetched(url: str, key: str, cache: str) -> BlockCache:
    """Fetches all but the tokens of the folder at `url`, unless it is in the cache. key: the setting that names it;
    cache: `data.cache`.

    Raises DataError if the folder is missing, faulty or refused, ConnectionError if the store does not answer.
    """
    url = url.rstrip("/")
    where = cache_folder(cache)
    with _reading(key, url, f"{MANIFEST_FILE} is missing: it must be a folder of token files, uploaded whole"):
        system, inner = filesystem(url)
        text = system.cat_file(f"{inner}/{MANIFEST_FILE}")
    manifest = Manifest.parse(f"{url}/{MANIFEST_FILE}", text)
    dtype = token_dtype(manifest.vocab_size)
    sizes: dict[str, int | None] = dict.fromkeys(TOKENIZER_FILES)
    hashes: dict[str, str] = {}
    for entry in manifest.files:
        sizes |= {f"{entry.name}{suffix}": size for suffix, size in entry.sizes(dtype).items()}
        hashes |= {f"{entry.name}{suffix}": digest for suffix, digest in entry.sha256.items()}
    with ThreadPoolExecutor(THREADS) as pool:
        found = dict(zip(sizes, pool.map(lambda name: _described(system, key, url, inner, name), sizes), strict=True))
    for name, size in sizes.items():
        if size not in (None, found[name].size):
            raise DataError(f"{key}={url}: {name} has {found[name].size} bytes, but the manifest says {size}")
    files = [RemoteFile(name, f"{url}/{name}", f.size, hashes.get(name, ""), f.fetch) for name, f in found.items()]
    versions = "".join(f"\n{name} {file.size} {file.version}" for name, file in found.items())
    digest = hashlib.sha256(f"{url}\n{blocks.BLOCK}\n".encode() + text + versions.encode()).hexdigest()[:16]
    folder = where / f"{url.rpartition('/')[2]}-{digest}"
    bins = [file for file in files if file.name.endswith(".bin")]
    try:
        with _alone(folder):
            if not (folder / MANIFEST_FILE).is_file():
                BlockCache.prepare(folder, bins)
                _fetch_whole(folder, [file for file in files if not file.name.endswith(".bin")])
                with durable(folder / MANIFEST_FILE) as file:
                    file.write(text)
    except OSError as error:
        if isinstance(error, ConnectionError):
            raise
        raise DataError(
            f"data.cache={folder}: {error.strerror or error}: it must be on a disk with room and locks, and of this"
            " user"
        ) from error
    with _opening:
        if (os.getpid(), folder) not in _open:
            _open[os.getpid(), folder] = BlockCache(folder, bins)
        return _open[os.getpid(), folder]


def cache_folder(cache: str) -> Path:
    """Returns the folder of data.cache on this node. Raises DataError if it is not a folder that can be written."""
    places = [os.path.expanduser(os.path.expandvars(place)) for place in ([cache] if cache else DEFAULT_CACHES)]
    folder = next((place for place in places if "$" not in place), None)
    if folder is None:
        raise DataError(f"data.cache={cache} must have variables that this node knows: set them, or name a folder")
    check_folder(f"data.cache={folder}", Path(folder))
    return Path(folder)


def _described(system: Any, key: str, url: str, inner: str, name: str) -> _Stored:
    """Looks at one file: a request. The file stays open, because S3's client then asks for the same version each time,
    and fails if it has changed.
    """
    path, whole = f"{inner}/{name}", f"{url}/{name}"
    with _reading(key, url, f"{name} is missing: upload the folder again"):
        if whole.startswith(WEB) and not takes_ranges(whole):
            raise DataError(f"{key}={url}: the web server must answer requests for a part of {name}")
        file = system.open(path, "rb", cache_type="none") if hasattr(system, "call_s3") else None
        details = system.info(path) if file is None else file.details
    if details.get("size") is None:
        raise DataError(f"{key}={url}: the server must say how large {name} is")

    def fetch(start: int, stop: int) -> bytes:
        try:
            data: bytes = system.cat_file(path, start, stop) if file is None else file._fetch_range(start, stop)
            return data
        except (FileNotFoundError, PermissionError) as error:
            raise DataError(f"{whole} can no longer be read: {type(error).__name__}: {headline(error)}") from error
        except Exception as error:
            if type(error).__name__ != "FileExpired":  # s3fs's
                raise
            raise DataError(
                f"{whole} has changed in the store since this run has opened it; start the command again: it reads the"
                " folder as it is now, and resumes"
            ) from error

    version = next((details[name] for name in VERSIONS if details.get(name)), "")
    return _Stored(details["size"], f"{version}", fetch)


def _fetch_whole(folder: Path, files: list[RemoteFile]) -> None:
    """Fetches files that are not in the folder, and compares them with their hashes. Removes what a killed process has
    left of others.
    """
    for path in folder.rglob(f"*{TEMPORARY_MARK}*"):
        path.unlink()

    def fetch(file: RemoteFile) -> None:
        place = folder / file.name
        if place.is_file():  # of a start that was killed: it got its name when it was whole
            return
        place.parent.mkdir(exist_ok=True)
        with durable(place) as written:
            for start in range(0, file.size, PIECE_BYTES):
                written.write(attempted(file, start, min(start + PIECE_BYTES, file.size)))
            if file.sha256 not in ("", written.sha256):
                raise DataError(f"{file.url}: its sha256 does not match the manifest; upload the folder again")

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(fetch, files))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Makes the folder, and waits until no other process fills it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _reading(key: str, url: str, missing: str) -> Iterator[None]:
    """Turns the errors of every client into one line. missing: what to say about a file that does not exist."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{key}={url}: {missing} ({headline(error)})") from error
    except ValueError as error:  # from fsspec: no such protocol, or a client lacks a setting
        raise DataError(f"{key}={url} cannot be read: {headline(error)}; {CREDENTIALS}") from error
    except Exception as error:
        what = f"{key}={url} cannot be read: {type(error).__name__}: {headline(error)}"
        if isinstance(error, PermissionError) or type(error).__name__ in REFUSALS:
            raise DataError(f"{what}; {CREDENTIALS}") from error
        raise ConnectionError(f"{what}; {CREDENTIALS}") from error
