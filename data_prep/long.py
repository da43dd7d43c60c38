"""Reads documents too large for memory in pieces, cut at places where tokenisation is not affected.

A large file is decoded block by block. A large row of JSON is copied to a temporary file, and a scanner that holds one
block finds the text in it. Both are read twice: first for the digest, which decides the split, then for the ids.
"""

import codecs
import json
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from hashlib import blake2b
from itertools import chain
from typing import BinaryIO, NamedTuple

from data_prep import source
from data_prep.clean import DIGEST_BYTES

LONG_BYTES = 8 << 20  # bytes; a larger document is not held in memory
PIECE_CHARACTERS = 1 << 20
WINDOW = 1 << 16  # characters at a piece's end that are searched for a place to cut

# Good places to cut, because split patterns start a new match there: at a line end between a character that is not a
# space and a letter, else before a single space between two letters.
CUTS = (re.compile(r"(?<=\S)\n(?=[^\W\d_])"), re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])"))
# Characters and whole escapes, but not half a surrogate pair whose other half may be in the next block.
HALF_OF_A_PAIR = r"u[dD][89abAB][0-9a-fA-F]{2}(?:\\(?:u[0-9a-fA-F]{0,3})?)?\Z"
STRING = re.compile(rf'[^"\\]*+(?:\\(?!{HALF_OF_A_PAIR})(?:u[0-9a-fA-F]{{4}}|[^u])[^"\\]*+)*+', re.DOTALL)
WORD = re.compile(r"true|false|null|NaN|-?Infinity|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
LONGEST_WORD = 4300  # Python's limit for the digits of an integer
SURROGATE = re.compile("[\ud800-\udfff]")
LONGEST_ESCAPE = 12  # characters of a surrogate pair

# Text that the scanner skips in one match, if it is plain and complete in the block.
ESCAPE = r"\\(?:[\"\\/bfnrt]|u[0-9a-fA-F]{4})"
PLAIN_STRING = rf'"[^"\\\x00-\x1f]*+(?:{ESCAPE}[^"\\\x00-\x1f]*+)*+"'
PLAIN_NUMBER = r"(?=[-0-9])-?(?:0|[1-9][0-9]{0,999}+)(?:\.[0-9]{1,999}+)?+(?:[eE][+-]?[0-9]{1,9}+)?+(?=[\s,\]}])"
PLAIN_WORD = rf"{PLAIN_NUMBER}|(?:true|false|null)(?=[\s,\]}}])"
PLAIN_VALUE = rf"{PLAIN_STRING}|{PLAIN_WORD}"
for _ in range(4):  # levels of brackets
    PLAIN_VALUE = rf"{PLAIN_STRING}|[\[{{](?:[\s,:]++|{PLAIN_VALUE})*+[\]}}]|{PLAIN_WORD}"
SPACES, ITEMS = re.compile(r"\s*+"), re.compile(rf"(?:[\s,:]++|{PLAIN_VALUE})*+")
OPENERS, CLOSERS = re.compile(r"(?:[\s,:]*+[\[{])*+"), re.compile(r"(?:[\s,:]*+[\]}])*+")


class LongDocument(NamedTuple):
    """A document's id, and a function that reads its text from the start, in pieces."""

    id: str
    pieces: Callable[[], Iterator[str]]


def digest_and_size(pieces: Iterable[str], largest: int) -> tuple[bytes, int]:
    """The digest and the size of the UTF-8. Raises ValueError if the document is not UTF-8, not JSON, or larger than
    `largest` bytes.
    """
    digest, size = blake2b(digest_size=DIGEST_BYTES), 0
    for piece in pieces:
        data = piece.encode()
        digest.update(data)
        size += len(data)
        if size > largest:
            raise ValueError(f"more than {largest:,} bytes (max_document_mib)")
    return digest.digest(), size


def cut(pieces: Iterable[str]) -> Iterator[str]:
    """Cuts the text into pieces of about a million characters."""
    held = ""
    for piece in pieces:
        held += piece
        if len(held) > PIECE_CHARACTERS:
            place = cut_of(held)
            yield held[:place]
            held = held[place:]
    if held:
        yield held


def cut_of(text: str) -> int:
    """The last good place to cut near the end; the end if there is none."""
    start = max(0, len(text) - WINDOW)
    for pattern in CUTS:
        places = [match.end() for match in pattern.finditer(text, start)]
        if places:
            return places[-1]
    return len(text)


def text_pieces(path: str, compression: str | None) -> Iterator[str]:
    """Yields the file's text. Raises ValueError if it is not UTF-8."""
    return decoded(source.blocks_of(path, compression), "utf-8")


def decoded(blocks: Iterable[bytes], encoding: str) -> Iterator[str]:
    """Decodes the blocks. Raises ValueError, with the message for a short document, if they are not UTF-8."""
    decoder, size = codecs.getincrementaldecoder(encoding)(), 0
    for block in chain(blocks, [b""]):
        held = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise ValueError(not_utf8(error, size - held)) from None
        size += len(block)
        yield text


def not_utf8(error: UnicodeDecodeError, before: int = 0) -> str:
    """The message for wrong UTF-8. before: bytes of the document ahead of the block with the error."""
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x} after {before + error.start} bytes)"


def half_of_a_pair(text_key: str) -> str:
    return f"{text_key!r} is not UTF-8: half of a surrogate pair"


class LongRow:
    """One large row of JSON lines. If a key occurs twice, the last one counts, as in a short row.

    The first pass therefore reads the whole row; each later pass reads up to the text. `heartbeat` is called at each
    block, so that a long way to the text does not look like a hang.
    """

    def __init__(self, row: BinaryIO, text_key: str, heartbeat: Callable[[], None]) -> None:
        self._row, self._key, self._beat = row, text_key, heartbeat

    def pieces(self) -> Iterator[str]:
        """Yields its text. Raises ValueError if it has no text, or is not JSON."""
        last, scanner = self._last, self._scanner()
        for number, first in enumerate(members(scanner, self._key), start=1):
            if number < last:
                scanner.skip(first)
                continue
            for piece in scanner.string():
                if SURROGATE.search(piece):
                    raise ValueError(half_of_a_pair(self._key))
                yield piece
            return

    def _scanner(self) -> "Scanner":
        return Scanner(decoded(row_blocks(self._row, self._beat), "utf-8-sig"))

    @cached_property
    def _last(self) -> int:
        """The number of members with the key: the last of them counts."""
        scanner, count, first = self._scanner(), 0, ""
        for first in members(scanner, self._key):
            count += 1
            scanner.skip(first)
        if not count:
            raise ValueError(f"no key {self._key!r} (corpus.text_key)")
        if first != '"':
            raise ValueError(f"{self._key!r} must be text")
        return count


def members(scanner: "Scanner", key: str) -> Iterator[str]:
    """Yields the first character of the value of each member with that name; the caller reads the rest."""
    others = other_members(key)
    if scanner.next() != "{":
        raise ValueError("a row must be an object")
    first = scanner.next()
    while first != "}":
        if first != '"':
            raise ValueError(f"not JSON: {first!r} instead of a key")
        name = "".join(scanner.string())
        if scanner.next() != ":":
            raise ValueError("not JSON: no colon after a key")
        first = scanner.next()
        if name == key:
            yield first
        else:
            scanner.skip(first)
        end = scanner.next()
        if end not in ",}":
            raise ValueError("not JSON: no comma after a value")
        first = scanner.past(others).next() if end == "," else end
        if end == "," and first == "}":
            raise ValueError("not JSON: a comma before the end of the object")
    scanner.end()


def other_members(text_key: str) -> re.Pattern[str]:
    """A pattern for plain members and their commas, up to a key that may be this one in any spelling (escapes)."""
    key = "".join(rf"(?:{re.escape(char)}|(?:{ESCAPE}){{{1 + (ord(char) > 0xFFFF)}}})" for char in text_key)
    return re.compile(rf'(?:\s*+(?!"{key}"){PLAIN_STRING}\s*+:\s*+(?:{PLAIN_VALUE})\s*+,)*+')


def row_blocks(row: BinaryIO, heartbeat: Callable[[], None]) -> Iterator[bytes]:
    row.seek(0)
    while block := row.read(source.BLOCK_BYTES):
        heartbeat()
        yield block


def loaded(escaped: str) -> str:
    try:
        return str(json.loads(f'"{escaped}"'))
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg.removesuffix(' at')}") from None


class Scanner:
    """Reads JSON forwards, holding one block."""

    def __init__(self, blocks: Iterator[str]) -> None:
        self._blocks, self._text, self._at = filter(None, blocks), "", 0

    def _more(self) -> bool:
        block = next(self._blocks, None)
        self._text, self._at = self._text[self._at :] + (block or ""), 0
        return block is not None

    def _take(self, run: re.Pattern[str]) -> str:
        """Takes and returns the match at this place; `run` also matches the empty string."""
        match = run.match(self._text, self._at)
        assert match is not None
        self._at = match.end()
        return match.group()

    def past(self, run: re.Pattern[str]) -> "Scanner":
        self._take(run)
        return self

    def next(self) -> str:
        """Takes the next character that is not a space. Raises ValueError at the end."""
        while self._at < len(self._text) or self._more():
            character = self._text[self._at]
            if not character.isspace():
                self._at += 1
                return character
            self._take(SPACES)
        raise ValueError("not JSON: it ends too early")

    def end(self) -> None:
        """Raises ValueError if anything except spaces is left."""
        while self._at < len(self._text) or self._more():
            self._take(SPACES)
            if self._at < len(self._text):
                raise ValueError("not JSON: something follows the object")

    def string(self) -> Iterator[str]:
        """Yields the rest of a string, and takes its closing quote."""
        while True:
            match = STRING.match(self._text, self._at)
            assert match is not None
            end = match.end()
            ended = self._text[end : end + 1] == '"'
            piece = self._text[self._at : end]
            self._at = end + ended
            if piece:
                yield loaded(piece)
            if ended:
                return
            stuck = len(self._text) - self._at > LONGEST_ESCAPE
            if stuck or not self._more():
                raise ValueError("not JSON: a string with no end, or a wrong escape")

    def skip(self, first: str) -> None:
        """Skips the rest of a value that begins with `first`."""
        depth = 0
        while True:
            if first == '"':
                for _ in self.string():
                    pass
            elif first in "[{":
                depth += 1 + sum(map(self._take(OPENERS).count, "[{"))
            elif first in "]}" and depth:
                depth -= 1 + self._closers(depth - 1)
            elif first not in ",:" or not depth:
                self._skip_word(first)
            if depth == 0:
                return
            first = self.past(ITEMS).next()

    def _closers(self, most: int) -> int:
        """Takes the closing brackets at this place, at most `most`; returns their number."""
        start = self._at
        run = self._take(CLOSERS)
        ends = [place for place, character in enumerate(run, start + 1) if character in "]}"][:most]
        self._at = ends[-1] if ends else start
        return len(ends)

    def _skip_word(self, word: str) -> None:
        while self._at < len(self._text) or self._more():
            character = self._text[self._at]
            if character in ",]}" or character.isspace() or len(word) > LONGEST_WORD:
                break
            word += character
            self._at += 1
        if len(word) > LONGEST_WORD or not WORD.fullmatch(word):
            raise ValueError(f"not JSON: {word[:20]!r} is not a value")
