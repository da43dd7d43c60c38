"""Exports a checkpoint as a folder that `transformers` can load."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.durable import durable, durable_folder
from data_prep.progress import progress
from data_prep.special_tokens import CONFIG, GENERATION, SpecialTokens
from data_prep.tokenizer_spec import TokenizerSpec

from ..checkpoint.rows import CheckpointRows
from ..checkpoint.tensor_file import Streamed, write_streamed
from ..families import FAMILIES, HuggingFace, ModelConfig, WeightMapping
from ..families.family import HEAD
from .folder import EMBEDDING, INDEX, OUTPUT, WEIGHTS, pieces
from .tokenizer import to_hf

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FILE_BYTES = 5_000_000_000


def export(
    checkpoint: CheckpointRows,
    model: ModelConfig,
    spec: TokenizerSpec | None,
    out: Path,
    dtype: torch.dtype,
    materialize_head: bool,
    embed_scale: float = 1.0,
    source: SpecialTokens | None = None,
) -> int:
    """Writes the folder `out` atomically. Returns the number of parameters. The matrix has V rows, without padding.

    embed_scale: the embedding is multiplied by it; a tied model with a factor other than 1 becomes untied.
    source: special tokens of the model that the run started from, which are kept; None: the end-of-document token is
    bos and eos. materialize_head: also write the head of a tied model, for readers that expect it.
    Raises ValueError if `out` exists or transformers has no equal model, OSError if the disk is full.
    """
    family = FAMILIES[model.family].hugging_face
    one = OUTPUT not in checkpoint.shapes
    tied = one and embed_scale == 1
    output = None if tied and not materialize_head else EMBEDDING if one else OUTPUT
    tensors = streams(checkpoint, model, family, dtype, output, embed_scale)
    end = None if spec is None else spec.end_of_document
    own, kept = {"bos_token_id": end, "eos_token_id": end}, None if source == SpecialTokens() else source
    config = family.settings(model) | {
        "vocab_size": checkpoint.manifest["vocab_size"],
        "tie_word_embeddings": tied,
        **(own | {"pad_token_id": None} if kept is None else kept.config),
        "use_cache": True,
        "dtype": str(dtype).removeprefix("torch."),
    }
    texts = {CONFIG: config, GENERATION: own if kept is None else kept.generation or kept.config}
    if spec is not None:
        texts |= to_hf(spec, model.context, kept)
    with durable_folder(out) as unfinished:
        _write_weights(unfinished, tensors)
        for name, content in texts.items():
            _write(unfinished / name, content)
    return sum(tensor.bytes for tensor in tensors) // dtype.itemsize


def streams(
    checkpoint: CheckpointRows,
    model: ModelConfig,
    family: HuggingFace,
    dtype: torch.dtype,
    output: str | None,
    embed_scale: float,
) -> list[Streamed]:
    """Tensors of the Hugging Face model, read while written: one of the body, or some rows of the matrix, at a time.

    output: name of our tensor that becomes the head; None: no head.
    """
    rows, width = checkpoint.manifest["vocab_size"], model.width

    def matrix(theirs: str, ours: str, scale: float = 1.0) -> Streamed:
        def read() -> Iterator[Tensor]:
            for low, high in pieces(0, rows, 4 * width):
                yield checkpoint.rows(ours, low, high) * scale

        return Streamed(theirs, dtype, (rows, width), read)

    found = [matrix(family.prefix + family.embedding, EMBEDDING, embed_scale)]
    for mapping in family.mappings(model):
        found += _mapped(checkpoint, mapping, family, dtype)
    for theirs, length in family.missing(model).items():
        found.append(Streamed(family.prefix + theirs, dtype, (length,), partial(_zeros, length)))
    if output is not None:
        found.append(matrix(HEAD, output))
    return found


def _mapped(
    checkpoint: CheckpointRows, mapping: WeightMapping, family: HuggingFace, dtype: torch.dtype
) -> Iterator[Streamed]:
    first = 0
    for theirs, rows in mapping.theirs.items():
        shape = (rows, *checkpoint.shapes[mapping.ours][1:])

        def read(start: int = first, stop: int = first + rows) -> Iterator[Tensor]:
            part = checkpoint.rows(mapping.ours, start, stop)
            yield part.T if mapping.transposed else part

        yield Streamed(family.prefix + theirs, dtype, shape[::-1] if mapping.transposed else shape, read)
        first += rows


def _zeros(length: int) -> Iterator[Tensor]:
    yield torch.zeros(length)


def _write_weights(folder: Path, tensors: list[Streamed]) -> None:
    """Writes one file, or several files and their index."""
    files: list[list[Streamed]] = [[]]
    for tensor in tensors:
        if files[-1] and sum(other.bytes for other in files[-1]) + tensor.bytes > FILE_BYTES:
            files.append([])
        files[-1].append(tensor)
    if len(files) == 1:
        write_streamed(folder / WEIGHTS, tensors, {}, partial(progress, title="export"))
        return
    index: dict[str, str] = {}
    for i, part in enumerate(files, start=1):
        name = f"model-{i:05d}-of-{len(files):05d}.safetensors"
        write_streamed(folder / name, part, {}, partial(progress, title=f"export, file {i} of {len(files)}"))
        index |= dict.fromkeys((tensor.name for tensor in part), name)
    size = sum(tensor.bytes for tensor in tensors)
    _write(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": index})


def _write(path: Path, content: dict[str, Any]) -> None:
    with durable(path) as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n")
