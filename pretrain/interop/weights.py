"""Loads weights of a Hugging Face model into ours. Separate from folder.py because it needs torch."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..checkpoint.reading import model_for_reading
from ..checkpoint.state import ModelState
from ..config.init_from import folder_of
from ..config.vocab import VocabConfig
from ..models.language_model import LanguageModel
from .folder import EMBEDDING, OUTPUT, HFModel, pieces


def initialise(init_from: str, state: ModelState) -> None:
    """Loads the weights into an untrained model. Each rank reads its rows. Collectives: the engine's."""
    tensors: dict[str, Any] = dict(state.tensors())
    fill(tensors, HFModel(folder_of(init_from)))
    state.load(tensors, step=0)


def load_model(found: HFModel, device: torch.device, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Loads the model of the folder for inference. The matrix is sharded over the default process group, if any."""
    with torch.device("meta"):
        body = found.model.body()
    config = VocabConfig(tie=found.tie, **found.family.vocab)
    model, tensors = model_for_reading(body, config, found.vocab_size, found.model.width, device, dtype)
    fill(tensors, found)
    return model


def fill(tensors: dict[str, Any], found: HFModel) -> None:
    """Copies the weights into tensors and into the local parts of DTensors, by our names. No collective.

    Optimizer states and the padding rows of the matrix (from V on) do not change. If the source is tied and the model
    untied, both matrices get the embedding.
    """
    sources = {name: name for name in found.mappings} | {OUTPUT: OUTPUT if OUTPUT in found.mappings else EMBEDDING}
    for name, source in sources.items():
        if name == OUTPUT and OUTPUT not in tensors:
            continue
        tensor, start = tensors[name], 0
        if isinstance(tensor, DTensor):
            local = tensor.to_local()
            if not local.numel():
                continue
            (chunk,) = tensor.__create_chunk_list__()
            tensor, start = local, chunk.offsets[0]
        stop = min(start + len(tensor), found.mappings[source].shape[0])
        for low, high in pieces(start, stop, tensor[:1].nbytes):
            tensor[low - start : high - start].copy_(found.rows(source, low, high))
