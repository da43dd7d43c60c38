"""A run that begins with the weights of a Hugging Face model: `init_from=hf:DIR`."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from data_prep.tokenizer_spec import TokenizerSpec

from ..checkpoint import ModelState, unread_model
from ..llama import LlamaConfig
from ..model import LanguageModel
from ..vocab import VocabConfig
from .folder import HFModel
from .places import Model
from .tokenizer import from_hf

SCHEME = "hf:"


def folder_of(init_from: str) -> Path:
    """ValueError unless it is hf:DIR."""
    if not init_from.startswith(SCHEME) or init_from == SCHEME:
        raise ValueError(f"init_from={init_from} must be hf:DIR, the folder of a Hugging Face model")
    return Path(init_from.removeprefix(SCHEME))


def check_initial(init_from: str, model: Model, vocab: VocabConfig, rows: int, tokenizer: Path | None) -> None:
    """ValueError where a run of that model, `rows` and data's tokenizer cannot begin with these weights.

    A context of a Llama may be another: it has no weights. A tied model may go on untied, from two equal matrices.
    """
    found = HFModel(folder_of(init_from))
    theirs, ours = _settings(found.model), _settings(model)
    if theirs["family"] != ours["family"]:
        raise ValueError(f"model.family={ours['family']} must be {theirs['family']}, which {init_from} is")
    free = {"context"} if theirs["family"] == "llama" else set()
    other = [f"model.{key}={_text(theirs[key])}" for key in theirs if theirs[key] != ours[key] and key not in free]
    if found.vocab_size != rows:
        other.append(f"vocab.size={found.vocab_size}")
    if found.tie == "untied" and vocab.tie != "untied":
        other.append("vocab.tie=untied")
    if vocab.embed_scale != 1:
        other.append("vocab.embed_scale=1.0")
    if vocab.softcap is not None:
        other.append("vocab.softcap=null")
    if other:
        raise ValueError(f"init_from={init_from} has other settings than this run: give {' '.join(other)}")
    spec, _ = tokenizer_of(found)
    if tokenizer is not None and spec is not None and not spec.has_rows_of(TokenizerSpec.load(tokenizer)):
        raise ValueError(f"init_from={init_from} has another tokenizer than {tokenizer}: its rows mean other tokens")


def initialise(init_from: str, state: ModelState) -> None:
    """Puts the weights into a model that has not been trained. Each rank reads its rows; collectives: the engine's."""
    tensors: dict[str, Any] = dict(state.tensors())
    HFModel(folder_of(init_from)).fill(tensors)
    state.load(tensors, step=0)


def load_model(found: HFModel, device: torch.device, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """The model as it is in the folder, for reading; the matrix split over the ranks of the default group, if there is
    one.
    """
    with torch.device("meta"):
        body = found.model.body()
    config = VocabConfig(tie=found.tie)
    model, tensors = unread_model(body, config, found.vocab_size, found.model.width, device, dtype)
    found.fill(tensors)
    return model


def tokenizer_of(found: HFModel) -> tuple[TokenizerSpec | None, str]:
    """Or why there is none. ValueError where it has more ids than the matrix has rows."""
    try:
        spec = from_hf(found.folder, found.end_of_text)
    except ValueError as error:
        return None, str(error)
    if spec.vocab_size > found.vocab_size:
        raise ValueError(f"{found.folder}: its tokenizer has {spec.vocab_size:,} ids, its matrix {found.vocab_size:,}")
    return spec, ""


def _settings(model: Model) -> dict[str, Any]:
    """head_size null is a number, too."""
    return asdict(model) | ({"head_size": model.size} if isinstance(model, LlamaConfig) else {})


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
