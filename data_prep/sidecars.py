"""Leaves out files beside the data of a folder: checksums, markers, and beside rows also cards and licences.

source.py lists all files of a path; this module chooses from the whole list, by name.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import PurePosixPath

from data_prep.source import FileInfo, folders, is_remote, kind_of, name_of

ROWS = (".jsonl", ".ndjson", ".json", ".parquet")
CHECKSUMS = re.compile(r".*\.(md5|sha1|sha224|sha256|sha384|sha512|crc|crc32|sfv|asc|sig)|(md5|sha\d+)(sums?)?(\.txt)?")
MARKERS = re.compile(r"_(success|metadata|common_metadata|committed_.*|started_.*)")
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json")
CARDS = re.compile(r"(readme|licen[cs]e|copying|notice|citation|changelog|contributing|dataset_?card)([-_.].*)?")
HELD_OUT = re.compile(r"(?<![a-z])(tests?|testing|valid|validation|val|dev|eval)(?![a-z])")
SHOWN = 3


def sifted(name: str, files: list[FileInfo]) -> tuple[list[FileInfo], str]:
    """Chooses the data among the files of one item of corpus.paths; also a line about left-out and held-out files.

    If no file looks like data, all files are data.
    """
    kinds = ["dot file" if is_remote(name) and hidden(file.path, name) else sidecar(file.path) for file in files]
    rows = [file for file, kind in zip(files, kinds, strict=True) if not kind and kind_of(file.path) in ROWS]
    left = ["checksum", "marker", "dot file", *(["data set description", "card or licence"] if rows else [])]
    kept = [file for file, kind in zip(files, kinds, strict=True) if kind not in left]
    if not kept:
        return files, ""
    counts = Counter(kind for kind in kinds if kind in left) + Counter({"dot file": unlisted(name)})
    parts = [f"left out: {', '.join(counted(counts[kind], kind) for kind in left if counts[kind])}"] if counts else []
    held_out = held_out_of([file.path for file in rows])
    if held_out:
        more = f" and {len(held_out) - SHOWN:,} more" if len(held_out) > SHOWN else ""
        parts.append(
            f"read too: {', '.join(held_out[:SHOWN])}{more} (to leave them out, name the others in corpus.paths)"
        )
    return kept, f"{name}: {'; '.join(parts)}" if parts else ""


def unlisted(folder: str) -> int:
    """The number of dot files and dot folders in a local folder. They are not listed."""
    if is_remote(folder) or not os.path.isdir(folder):
        return 0
    return sum(entry.startswith(".") for below in folders(folder) for entry in os.listdir(below))


def counted(number: int, kind: str) -> str:
    many = "cards or licences" if kind == "card or licence" else f"{kind}s"
    return f"{number:,} {kind if number == 1 else many}"


def hidden(path: str, folder: str) -> bool:
    """True if the file or a folder above it begins with a dot. Remote listings include these files."""
    return "/." in "/" + path.removeprefix(folder).lstrip("/")


def sidecar(path: str) -> str:
    """The kind of a file beside the data, by its name; "" for data."""
    name = name_of(path).name.lower()
    if CHECKSUMS.fullmatch(name):
        return "checksum"
    if MARKERS.fullmatch(name):
        return "marker"
    if name in DESCRIPTIONS:
        return "data set description"
    return "card or licence" if CARDS.fullmatch(name) and kind_of(path) not in ROWS else ""


def held_out_of(paths: list[str]) -> list[str]:
    """The files whose names say test or validation, if other files' names do not; paths below their common folder."""
    names = below(paths)
    found = [name for name in names if HELD_OUT.search(name.lower())]
    return found if len(found) < len(names) else []


def below(paths: Iterable[str]) -> list[str]:
    names = [PurePosixPath(path) for path in paths]
    if len(names) < 2:
        return [name.name for name in names]
    common = os.path.commonpath([name.parent for name in names])
    return [name.relative_to(common).as_posix() for name in names]
