"""Imports and exports Hugging Face models. Separate from the command hf.py because it needs torch."""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from data_prep.special_tokens import KEPT_AS, SpecialTokens
from data_prep.token_file import TOKENIZER_FOLDER
from data_prep.tokenizer_spec import TokenizerSpec

from ..checkpoint import check_files
from ..checkpoint.rows import CheckpointRows, save_weights
from ..checkpoint.tensor_file import Streamed
from ..compose import write_config
from ..config.job import JobConfig
from ..families import FAMILIES
from ..interop.export import DTYPES, export
from ..interop.folder import EMBEDDING, OUTPUT, HFModel, pieces
from ..interop.initial import FoundTokenizer
from ..vocab import VocabConfig, VocabShard


def import_folder(found: HFModel, tokenizer: FoundTokenizer, config: JobConfig) -> Iterator[str]:
    """Imports a folder into the empty run of `config`; yields what to print. The caller holds the run's lock."""
    run, (spec, special, remark) = config.run_dir, tokenizer
    about = {
        "config": asdict(config),
        "vocab_size": found.vocab_size,
        "tokenizer_fingerprint": None if spec is None else spec.fingerprint,
    }
    tensors = streams(found, config.vocab.multiple)
    try:
        folder = save_weights(run, tensors, about, partial(write_config, config, spec, special))
    except BaseException:
        (run / KEPT_AS).unlink(missing_ok=True)
        config.path.unlink(missing_ok=True)  # the run had none before
        raise
    padding = sum(tensor.shape[0] - found.vocab_size for tensor in tensors if tensor.name in (EMBEDDING, OUTPUT))
    count = sum(tensor.bytes for tensor in tensors) // torch.float32.itemsize - padding * found.model.width
    yield f"{folder}: {count / 1e6:,.1f}M parameters, {found.vocab_size:,} rows, {found.tie}"
    if spec is None:
        yield f"tokenizer: none; {remark}"
    else:
        yield f"tokenizer: {run / TOKENIZER_FOLDER}, {spec.vocab_size:,} ids{remark and f'; {remark}'}"


def streams(found: HFModel, multiple: int) -> list[Streamed]:
    """Returns our tensors in fp32, the matrix with its padding rows."""
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in found.model.body().named_parameters()}
    padded = VocabShard.of(0, 1, found.vocab_size, multiple).padded_size
    for name in (EMBEDDING, OUTPUT) if found.tie == "untied" else (EMBEDDING,):
        shapes[name] = (padded, found.model.width)

    def read(name: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
        rows = found.vocab_size if name in (EMBEDDING, OUTPUT) else shape[0]
        for low, high in pieces(0, rows, torch.empty(shape[1:], device="meta").nbytes):
            yield found.rows(name, low, high)
        yield torch.zeros(shape[0] - rows, *shape[1:])

    return [Streamed(name, torch.float32, shape, partial(read, name, shape)) for name, shape in sorted(shapes.items())]


def export_run(
    checkpoint: CheckpointRows, config: JobConfig, run: Path, out: Path, dtype: str, head: bool
) -> Iterator[str]:
    """Exports a checkpoint of a run to `out`; yields what to print. dtype: a key of DTYPES."""
    check_files(checkpoint.folder, checkpoint.manifest)
    theirs = VocabConfig(**FAMILIES[config.model.family].vocab)
    tokenizer = run / TOKENIZER_FOLDER
    spec = TokenizerSpec.load(tokenizer) if tokenizer.is_dir() else None
    scale, special = config.vocab.embed_scale / theirs.embed_scale, SpecialTokens.of_run(run)
    count = export(checkpoint, config.model, spec, out, DTYPES[dtype], head, scale, special)
    yield f"{out}: {checkpoint.folder}, {count / 1e6:,.1f}M parameters in {dtype}"
    if spec is None:
        yield f"no tokenizer: {run} has none"
