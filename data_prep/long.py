"""Documents too large to hold: read in pieces, as often as needed, and cut where no tokenizer sees it.

A large file is decoded block by block; of a large row of JSON there is a temporary file, in which a scanner that holds
one block finds the text's string. Both are gone through twice: for the digest, which decides the split, and the ids.
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

LONG_BYTES = 8 << 20  # a document of more is not held
PIECE_CHARACTERS = 1 << 20
WINDOW = 1 << 16  # characters at a piece's end in which a place to cut is looked for

# After a line end between two characters that are no spaces, else before a single space: split patterns begin anew.
CUTS = (re.compile(r"(?<=\S)\n(?=[^\W\d_])"), re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])"))
# Characters and whole escapes; not the first half of a surrogate pair where the second may come with the next block.
HALF_OF_A_PAIR = r"u[dD][89abAB][0-9a-fA-F]{2}(?:\\(?:u[0-9a-fA-F]{0,3})?)?\Z"
STRING = re.compile(rf'[^"\\]*+(?:\\(?!{HALF_OF_A_PAIR})(?:u[0-9a-fA-F]{{4}}|[^u])[^"\\]*+)*+', re.DOTALL)
WORD = re.compile(r"true|false|null|NaN|-?Infinity|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
LONGEST_WORD = 4300  # Python's bound for the digits of an integer
SURROGATE = re.compile("[\ud800-\udfff]")
LONGEST_ESCAPE = 12  # a surrogate pair

# What is passed over in one go, as far as it is plain and whole in the block; the scanner goes on where that ends.
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
    """A name that finds it again, and a function that reads its text anew, in pieces."""

    id: str
    pieces: Callable[[], Iterator[str]]


def digest_and_size(pieces: Iterable[str], largest: int) -> tuple[bytes, int]:
    """Digest and bytes of their UTF-8. Raises ValueError if it is not UTF-8, not JSON, or more than `largest` bytes."""
    digest, size = blake2b(digest_size=DIGEST_BYTES), 0
    for piece in pieces:
        data = piece.encode()
        digest.update(data)
        size += len(data)
        if size > largest:
            raise ValueError(f"more than {largest:,} bytes (max_document_mib)")
    return digest.digest(), size


def cut(pieces: Iterable[str]) -> Iterator[str]:
    """The same text in pieces of about a million characters."""
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
    """A place near the end: the last one that is a good one, else the end."""
    start = max(0, len(text) - WINDOW)
    for pattern in CUTS:
        places = [match.end() for match in pattern.finditer(text, start)]
        if places:
            return places[-1]
    return len(text)


def text_pieces(path: str, compression: str | None) -> Iterator[str]:
    """The file's text. ValueError if it is not UTF-8."""
    return decoded(source.blocks_of(path, compression), "utf-8")


def decoded(blocks: Iterable[bytes], encoding: str) -> Iterator[str]:
    """The text of the blocks. ValueError, in the words of a short document, if it is not UTF-8."""
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
    """Says what is wrong; `before` bytes are ahead of those of the error."""
    return f"not UTF-8 (byte 0x{error.object[error.start]:02x} after {before + error.start} bytes)"


def half_of_a_pair(text_key: str) -> str:
    return f"{text_key!r} is not UTF-8: half of a surrogate pair"


class LongRow:
    """One large row of JSON lines. Of two keys of one name the last counts, as in a short row.

    So the row is gone through to its end once, and then again up to its text, as often as that is read. `heartbeat` is
    called at each block: a long way to the text is no standstill.
    """

    def __init__(self, row: BinaryIO, text_key: str, heartbeat: Callable[[], None]) -> None:
        self._row, self._key, self._beat = row, text_key, heartbeat

    def pieces(self) -> Iterator[str]:
        """Its text. ValueError if it has none, or is not JSON."""
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
        """How many members have the key: the last of them counts."""
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
    """Goes to each member of that name and gives the first character of its value; the caller takes the rest."""
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
    """Plain members, each with its comma, up to one whose key may be this one, however it is spelled."""
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
    """Goes through JSON forwards, holding one block."""

    def __init__(self, blocks: Iterator[str]) -> None:
        self._blocks, self._text, self._at = filter(None, blocks), "", 0

    def _more(self) -> bool:
        block = next(self._blocks, None)
        self._text, self._at = self._text[self._at :] + (block or ""), 0
        return block is not None

    def _take(self, run: re.Pattern[str]) -> str:
        """Takes and returns what matches here; `run` matches anywhere, if only nothing."""
        match = run.match(self._text, self._at)
        assert match is not None
        self._at = match.end()
        return match.group()

    def past(self, run: re.Pattern[str]) -> "Scanner":
        self._take(run)
        return self

    def next(self) -> str:
        """The next character that is no space, taken; ValueError at the end."""
        while self._at < len(self._text) or self._more():
            character = self._text[self._at]
            if not character.isspace():
                self._at += 1
                return character
            self._take(SPACES)
        raise ValueError("not JSON: it ends too early")

    def end(self) -> None:
        """ValueError unless nothing but space is left."""
        while self._at < len(self._text) or self._more():
            self._take(SPACES)
            if self._at < len(self._text):
                raise ValueError("not JSON: something follows the object")

    def string(self) -> Iterator[str]:
        """The rest of a string, its end taken."""
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
        """The rest of a value that begins with `first`."""
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
        """Takes the brackets that close here, `most` at most; how many."""
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
            raise ValueError(f"not JSON: {word[:20]!r} is no value")
