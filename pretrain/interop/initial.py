"""Checks of `init_from=hf:DIR`, the Hugging Face model that a run starts from. Imports no torch, for launchers."""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.hf_tokenizer import from_hf
from data_prep.special_tokens import SpecialTokens
from data_prep.tokenizer_spec import TokenizerSpec

from ..config.init_from import folder_of
from ..config.vocab import VocabConfig
from ..families import ModelConfig
from .folder import HFModel


def check_initial(init_from: str, model: ModelConfig, vocab: VocabConfig, rows: int, tokenizer: Path | None) -> str:
    """Checks that a run can start from these weights. Returns a warning, or "".

    rows: the run's vocabulary size. tokenizer: the data's, None if unknown. Settings that do not affect the weights may
    differ, for example the context of a Llama. A tied model may continue untied, with two equal matrices.

    Raises ValueError if model, vocabulary or tokenizer do not match.
    """
    found = HFModel(folder_of(init_from))
    family = found.family
    if model.family != family.name:
        raise ValueError(f"model.family={model.family} must be {family.name}, the family of {init_from}")
    theirs, ours, their_vocab = family.explicit(found.model), family.explicit(model), VocabConfig(**family.vocab)
    free = family.without_weights
    other = [f"model.{key}={_text(theirs[key])}" for key in theirs if theirs[key] != ours[key] and key not in free]
    if found.vocab_size != rows:
        other.append(f"vocab.size={found.vocab_size}")
    if found.tie == "untied" and vocab.tie != "untied":
        other.append("vocab.tie=untied")
    for key in ("embed_scale", "softcap"):
        if getattr(vocab, key) != getattr(their_vocab, key):
            other.append(f"vocab.{key}={_text(getattr(their_vocab, key))}")
    if other:
        raise ValueError(f"init_from={init_from} has other settings than this run: give {' '.join(other)}")
    spec, _, why = tokenizer_of(found)
    if spec is None or tokenizer is None:
        why = "the data has none" if tokenizer is None else why
        return f"init_from={init_from}: its tokenizer cannot be compared with the data's: {why}"
    if not spec.has_rows_of(TokenizerSpec.load(tokenizer)):
        raise ValueError(f"init_from={init_from} has another tokenizer than {tokenizer}: its rows mean other tokens")
    return ""


def special_tokens(init_from: str) -> SpecialTokens:
    """Special tokens of the model that a run starts from."""
    return tokens_with_rows(HFModel(folder_of(init_from)))


def tokens_with_rows(found: HFModel) -> SpecialTokens:
    return SpecialTokens.read(found.folder).below(found.vocab_size)


class FoundTokenizer(NamedTuple):
    spec: TokenizerSpec | None
    special: SpecialTokens  # special tokens with a row in the matrix
    remark: str  # reason for a missing spec, or a token that the spec lacks


def tokenizer_of(found: HFModel) -> FoundTokenizer:
    """Reads the tokenizer of the folder. One unused token without a row in the matrix is left out.

    Raises ValueError if more tokens have no row, or if a used token has no row.
    """
    special, rows = tokens_with_rows(found), found.vocab_size
    try:
        spec = from_hf(found.folder)
    except ValueError as error:
        return FoundTokenizer(None, special, str(error))
    if spec.vocab_size <= rows:
        return FoundTokenizer(spec, special, "")
    beyond = {name: id for name, id in spec.special_tokens.items() if id >= rows}
    said = SpecialTokens.read(found.folder)
    used = {spec.end_of_document, said.bos, *said.ends}
    if len(beyond) > 1 or used & set(beyond.values()) or max(spec.ranks.values()) >= rows:
        named = f": {', '.join(beyond)}" if beyond else ""
        raise ValueError(
            f"{found.folder}: its tokenizer has {spec.vocab_size:,} ids, its matrix {rows:,}{named}: add rows to the"
            " matrix (transformers: model.resize_token_embeddings(len(tokenizer))), or remove the tokens from the"
            " tokenizer"
        )
    (name,) = beyond
    kept = replace(spec, special_tokens={name: id for name, id in spec.special_tokens.items() if id < rows})
    return FoundTokenizer(kept, special, f"without {name}, id {beyond[name]:,}: the matrix has no row for it")


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
