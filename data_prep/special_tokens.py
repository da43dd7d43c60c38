"""Reads bos, eos and pad from a Hugging Face folder, and from a run that began with its weights.

A separate module: these tokens belong to a model, and do not change a tokenizer's files or fingerprint.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.durable import durable
from data_prep.errors import DataError, headline, nearest
from data_prep.lfs import refuse_pointer
from data_prep.tokenizer_spec import END_OF_DOCUMENT, TokenizerSpec

CONFIG, GENERATION = "config.json", "generation_config.json"
TOKENIZER, TOKENIZER_CONFIG, TOKENS_MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
VOCAB, MERGES = "vocab.json", "merges.txt"
KEPT_AS = "special_tokens.json"  # the file in a run's folder
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
NAMES = ("bos_token", "eos_token", "pad_token")


@dataclass(frozen=True)
class SpecialTokens:
    """Special tokens as each file defines them. The files may differ: an instruct model's tokenizer may end a turn,
    while config.json ends a text.

    Without a source all fields are empty, and a text begins and ends with the end-of-document token.
    """

    config: dict[str, Any] = field(default_factory=dict)  # IDS of config.json; eos may be a list
    generation: dict[str, Any] = field(default_factory=dict)  # IDS of generation_config.json
    tokenizer: dict[str, str | None] = field(default_factory=dict)  # NAMES of tokenizer_config.json
    names: dict[str, int] = field(default_factory=dict)  # ids of all special tokens, by the source's names
    adds_bos: bool = False  # the source's tokenizer puts bos before a text

    @classmethod
    def read(cls, folder: Path, tokenizer: Path | None = None) -> "SpecialTokens":
        """Reads the files that exist. tokenizer: the path of tokenizer.json, if it has another name. Raises DataError
        if a file is malformed.
        """
        content = read_json(tokenizer or folder / TOKENIZER, missing_ok=True)
        said = read_json(folder / TOKENS_MAP, missing_ok=True) | read_json(folder / TOKENIZER_CONFIG, missing_ok=True)
        by_name = {key: _content(said[key]) for key in NAMES if key in said}
        names = {str(token["content"]): int(token["id"]) for token in _objects(content.get("added_tokens"))}
        if not content and (folder / VOCAB).is_file():
            vocab = read_json(folder / VOCAB)
            names = {END_OF_DOCUMENT: vocab[END_OF_DOCUMENT]} if END_OF_DOCUMENT in vocab else {}
        config, generation = (read_json(folder / name, missing_ok=True) for name in (CONFIG, GENERATION))
        found = cls(_some(config, IDS), _some(generation, IDS), by_name, names)
        return cls(**asdict(found) | {"adds_bos": found._begins(content.get("post_processor"))})

    @classmethod
    def of_run(cls, run: Path) -> "SpecialTokens":
        """The tokens of the model whose weights the run began with; empty if there is none."""
        content = read_json(run / KEPT_AS, missing_ok=True)
        try:
            return cls(**content)
        except TypeError as error:
            raise DataError(f"{run / KEPT_AS} cannot be read: {headline(error)}") from error

    def save(self, run: Path) -> None:
        with durable(run / KEPT_AS) as file:
            file.write(json.dumps(asdict(self), indent=2, ensure_ascii=False).encode() + b"\n")

    @property
    def ends(self) -> list[int]:
        """The special tokens that end a text; config.json's come first."""
        said = [*_ids(self.config.get(IDS[1])), *_ids(self.generation.get(IDS[1]))]
        return self._known([*said, self._named(NAMES[1])])

    @property
    def bos(self) -> int | None:
        """The id that begins a text. The tokenizer's files come first: config.json may hold its class's default."""
        said = [*_ids(self.generation.get(IDS[0])), *_ids(self.config.get(IDS[0]))]
        return next(iter(self._known([self._named(NAMES[0]), *said])), None)

    @property
    def end_of_document(self) -> int | None:
        """<|endoftext|>, or the first of `ends`."""
        return self.names.get(END_OF_DOCUMENT, next(iter(self.ends), None))

    def begin(self, spec: TokenizerSpec) -> int:
        """The id before a text: bos, else the end-of-document id, as in training."""
        return spec.end_of_document if self.bos is None else self.bos

    def stops(self, spec: TokenizerSpec) -> set[int]:
        """The ids after which a text has ended."""
        return {spec.end_of_document, *self.ends}

    def below(self, rows: int) -> "SpecialTokens":
        """A copy without the tokens whose ids are not below `rows`."""
        gone = {name for name, id in self.names.items() if id >= rows}
        config, generation = (
            {k: v for k, v in given.items() if max(_ids(v), default=0) < rows} for given in self._by_id
        )
        tokenizer = {key: name for key, name in self.tokenizer.items() if name not in gone}
        names = {name: id for name, id in self.names.items() if name not in gone}
        return SpecialTokens(config, generation, tokenizer, names, self.adds_bos)

    def for_tokenizer(self) -> dict[str, str | None]:
        """The NAMES for a tokenizer_config.json: the source's own, else derived from the ids in the other files."""
        if self.tokenizer:
            return self.tokenizer
        of_id, said = {id: name for name, id in self.names.items()}, self.generation | self.config
        ids = {name: next(iter(self._known(_ids(said.get(key)))), None) for key, name in zip(IDS, NAMES, strict=True)}
        return {name: of_id[id] for name, id in ids.items() if id is not None}

    @property
    def _by_id(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.config, self.generation

    def _named(self, key: str) -> int | None:
        return self.names.get(self.tokenizer.get(key) or "")

    def _known(self, ids: Iterable[int | None]) -> list[int]:
        """The ids that are special tokens. Other ids are a class's defaults, not meant for this tokenizer."""
        special = set(self.names.values())
        return [id for id in dict.fromkeys(ids) if id is not None and id in special]

    def _begins(self, processor: Any) -> bool:
        """True if a post_processor puts bos before a text."""
        for part in _parts(processor):
            first = next(iter(_objects(part.get("single"))), {}).get("SpecialToken", {}).get("id")
            if first is not None and self.names.get(first) == self.bos is not None:
                return True
        return False


def read_json(path: Path, missing_ok: bool = False) -> dict[str, Any]:
    """Reads a JSON object. Raises DataError with the file's name if it is not one. missing_ok: {} if it is missing."""
    try:
        refuse_pointer(path)
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        if missing_ok:
            return {}
        raise DataError(f"{path} is missing{nearest(path.parent, '; ')}") from None
    except DataError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read: {headline(error)}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold an object")
    return content


def _some(content: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: content[key] for key in keys if key in content}


def _ids(value: Any) -> list[int]:
    """The ids in a value: a number, a list or None."""
    return [id for id in (value if isinstance(value, list) else [value]) if type(id) is int]


def _content(token: Any) -> str | None:
    """The text of a token: a text, an object with one, or None."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _objects(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _parts(processor: Any) -> Iterator[dict[str, Any]]:
    if isinstance(processor, dict):
        yield processor
        yield from _objects(processor.get("processors"))
