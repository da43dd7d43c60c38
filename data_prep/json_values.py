"""Reads JSON that is not one row per line: an array of objects, objects over several lines, several in one line.

A scanner finds only the end of each value, so memory holds one block of the file. A large value goes to a temporary
file, like a long row of JSON lines.
"""

import json
import re
from collections.abc import Iterable, Iterator
from tempfile import TemporaryFile
from typing import BinaryIO, NamedTuple, cast

BOM = b"\xef\xbb\xbf"
SPACE = b" \t\r\n"
GAP = re.compile(rb"[\s,]*+")
PLAIN = re.compile(rb'(?:[^"{}\[\]]++|"(?:[^"\\]++|\\.)*+")*+', re.DOTALL)  # in brackets: everything except brackets
IN_STRING = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
WHOLE_STRINGS = re.compile(rb'[^"]*+(?:"(?:[^"\\]++|\\.)*+"[^"]*+)*+', re.DOTALL)
WORD = re.compile(rb'[^\s,"{}\[\]]*+')
BEGINS = b'{["-0123456789tfnNI'


class JsonPart(NamedTuple):
    """Some bytes of the value that begins at byte `start` of the file. `last`: the value ends here."""

    start: int
    data: bytes
    last: bool


def parts(blocks: Iterable[bytes]) -> Iterator[JsonPart]:
    """Yields the values in parts: the elements of top-level arrays, and every value outside of arrays.

    Raises ValueError at text that does not begin a value, and if the file ends within a value or an array.
    """
    mode, in_array, depth, start, position, held = "gap", False, 0, 0, 0, b""
    for block in blocks:
        text, base, at, begin = held + block, position - len(held), 0, 0
        position, held = position + len(block), b""
        if base == 0 and text.startswith(BOM):
            at = len(BOM)
        while at < len(text):
            if mode == "gap":
                at = begin = end_of(GAP, text, at)
                first = text[at : at + 1]
                if first == (b"]" if in_array else b"["):
                    in_array, at = not in_array, at + 1
                elif first and first not in BEGINS:
                    raise ValueError(f"not JSON: {text[at : at + 20]!r} at byte {base + at}")
                elif first:
                    start, depth = base + at, int(first in b"{[")
                    mode = "brackets" if depth else "string" if first == b'"' else "word"
                    at += mode != "word"
                continue
            at = end_of({"brackets": PLAIN, "string": IN_STRING, "word": WORD}[mode], text, at)
            mark = text[at : at + 1]
            if mode == "string" and mark == b"\\":
                held = mark
                break
            if mode == "brackets":
                depth += (mark in (b"{", b"[")) - (mark in (b"}", b"]"))
            ended = bool(mark) and depth == 0
            if mark and mode != "word":
                at += 1
                mode = "string" if mode == "brackets" and mark == b'"' else "brackets"
            if ended:
                yield JsonPart(start, text[begin:at], True)
                mode = "gap"
        if mode != "gap" and begin < len(text) - len(held):
            yield JsonPart(start, text[begin : len(text) - len(held)], False)
    if mode == "word":
        yield JsonPart(start, b"", True)
    elif mode != "gap" or in_array:
        raise ValueError(f"not JSON: it ends within {'an array' if mode == 'gap' else f'the value at byte {start}'}")


def end_of(pattern: re.Pattern[bytes], text: bytes, at: int) -> int:
    match = pattern.match(text, at)
    assert match is not None  # each pattern also matches the empty string
    return match.end()


def values_of(blocks: Iterable[bytes], limit: int, largest: int) -> Iterator[tuple[int, int, bytes | BinaryIO]]:
    """Yields each value: its offset in the text, its size, its bytes (a temporary file if more than `limit` bytes).

    The temporary file holds a value of more than `largest` bytes only in part.
    """
    held, file, size = bytearray(), None, 0
    for part in parts(blocks):
        size += len(part.data)
        if file is None and size > limit:
            file = TemporaryFile()  # noqa: SIM115 - deleted when its last reader closes it
            file.write(held)
        if file is None:
            held += part.data
        elif size <= largest:
            file.write(part.data)
        if part.last:
            yield part.start, size, bytes(held) if file is None else cast(BinaryIO, file)
            held, file, size = bytearray(), None, 0


def is_values(head: bytes, whole: bool) -> bool:
    """True if the JSON begins with an array of rows, a row over several lines, or several rows in a line.

    `whole`: the head is the whole file, so a first value without an end is a truncated row.
    """
    text = head.removeprefix(BOM).lstrip(SPACE)
    if text[:1] == b"[":
        return text[1:].lstrip(SPACE)[:1] in (b"{", b"]", b"")
    if text[:1] != b"{":
        return False
    value = next(parts([text]))
    if value.last:
        follows = text[len(value.data) :].lstrip(b" \t\r")[:1]
        return (b"\n" in value.data or follows in (b"{", b",")) and is_object(value.data)
    line, newline, _ = text.partition(b"\n")
    return (
        not whole
        and bool(newline)
        and line.rstrip()[-1:] in (b"{", b"[", b",", b":")
        and bool(WHOLE_STRINGS.fullmatch(line))
    )


def is_object(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data), dict)
    except (ValueError, RecursionError):
        return False
