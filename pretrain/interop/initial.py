"""What must hold of a Hugging Face model that a run begins with: `init_from=hf:DIR`. No torch: launchers ask."""

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
    """A warning, or nothing.

    Raises ValueError if a run of that model, `rows` and data's tokenizer cannot begin with these weights.

    A setting that no weight depends on may differ, as the context of a Llama. A tied model may go on untied, from two
    equal matrices.
    """
    found = HFModel(folder_of(init_from))
    family = found.family
    if model.family != family.name:
        raise ValueError(f"model.family={model.family} must be {family.name}, which {init_from} is")
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
        why = "the data brings none" if tokenizer is None else why
        return f"init_from={init_from}: its tokenizer is not compared with the data's: {why}"
    if not spec.has_rows_of(TokenizerSpec.load(tokenizer)):
        raise ValueError(f"init_from={init_from} has another tokenizer than {tokenizer}: its rows mean other tokens")
    return ""


def special_tokens(init_from: str) -> SpecialTokens:
    """The special tokens of the model that a run begins with."""
    return tokens_with_rows(HFModel(folder_of(init_from)))


def tokens_with_rows(found: HFModel) -> SpecialTokens:
    return SpecialTokens.read(found.folder).below(found.vocab_size)


class FoundTokenizer(NamedTuple):
    spec: TokenizerSpec | None
    special: SpecialTokens  # the ones that have a row
    remark: str  # why there is no spec, or what it lacks


def tokenizer_of(found: HFModel) -> FoundTokenizer:
    """The folder's tokenizer. One unused token beyond the matrix is left out; ValueError if it has more of them."""
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
            f"{found.folder}: its tokenizer has {spec.vocab_size:,} ids, its matrix {rows:,}{named}: give the"
            " matrix their rows (transformers: model.resize_token_embeddings(len(tokenizer))), or take them out of the"
            " tokenizer"
        )
    (name,) = beyond
    kept = replace(spec, special_tokens={name: id for name, id in spec.special_tokens.items() if id < rows})
    return FoundTokenizer(kept, special, f"without {name}, id {beyond[name]:,}: the matrix has no row for it")


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
