"""Hugging Face in and out: `python -m pretrain.interop.hf --help`. One process, which never holds the whole matrix."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import Tensor

from data_prep.command import arguments_or, compose_settings, one_line
from data_prep.special_tokens import KEPT_AS, SpecialTokens
from data_prep.token_file import TOKENIZER_FOLDER
from data_prep.tokenizer_spec import TokenizerSpec

from ..checkpoint import (
    CheckpointError,
    CheckpointRows,
    Streamed,
    check_files,
    checkpoint_of,
    checkpoints,
    save_weights,
)
from ..compose import build_config, register_groups, write_config
from ..config.job import JobConfig
from ..families import FAMILIES, hugging_face_types
from ..locks import LAUNCH_LOCK, lock_run
from ..vocab import VocabConfig, VocabShard
from .export import DTYPES, export
from .folder import EMBEDDING, OUTPUT, HFModel, pieces
from .initial import tokenizer_of

NAMES = ", ".join(family.hugging_face.model_types[kind] for kind, family in hugging_face_types().items())
HELP = f"""Models of Hugging Face, in and out: {NAMES}; safetensors, never a pickle.

  python -m pretrain.interop.hf import hf=DIR run=RUN               a run with the model of DIR as its step 0
  python -m pretrain.interop.hf import hf=DIR run=RUN seed=1 …      with settings of a training, as in launch/local.py
  python -m pretrain.interop.hf export run=RUN out=DIR              its newest checkpoint, for transformers
  python -m pretrain.interop.hf export run=RUN out=DIR step=500 dtype=bf16 materialize_head=true

dtype: fp32, the main weights as they are, bf16 or fp16. materialize_head: a tied model, too, gets a head in its files,
for readers that look for one. To go on training a model, init_from=hf:DIR in launch/local.py is all that is needed.
"""
SET_BY_MODEL = ("model", *(f"vocab.{key}" for key in ("size", "tie", "softcap", "embed_scale")), "run.dir", "init_from")


def main() -> None:
    """Exits 0, or 2 with one line on a wrong command, folder or model."""
    with one_line(CheckpointError):
        arguments = arguments_or(HELP)
        if arguments[0] not in COMMANDS:
            raise ValueError(f"{arguments[0]} must be one of {', '.join(COMMANDS)}; see --help")
        for line in COMMANDS[arguments[0]](arguments[1:]):
            print(line, flush=True)


def import_model(arguments: list[str]) -> Iterator[str]:
    """Makes RUN of a folder; yields what to print."""
    given, settings = _given(arguments, ("hf", "run"), others=True)
    source, run = Path(_needed(given, "hf")), Path(_needed(given, "run"))
    found = HFModel(source)
    spec, special, remark = tokenizer_of(found)
    config = training(found, run, settings)
    about = {
        "config": asdict(config),
        "vocab_size": found.vocab_size,
        "tokenizer_fingerprint": None if spec is None else spec.fingerprint,
    }
    tensors = streams(found, config.vocab.multiple)
    with lock_run(run, LAUNCH_LOCK):
        _refuse_run(run, config.path)
        try:
            folder = save_weights(run, tensors, about, partial(write_config, config, spec, special))
        except BaseException:
            (run / KEPT_AS).unlink(missing_ok=True)
            config.path.unlink(missing_ok=True)  # there was none before
            raise
    padding = sum(tensor.shape[0] - found.vocab_size for tensor in tensors if tensor.name in (EMBEDDING, OUTPUT))
    count = sum(tensor.bytes for tensor in tensors) // torch.float32.itemsize - padding * found.model.width
    yield f"{folder}: {count / 1e6:,.1f}M parameters, {found.vocab_size:,} rows, {found.tie}"
    if spec is None:
        yield f"tokenizer: none; {remark}"
    else:
        yield f"tokenizer: {run / TOKENIZER_FOLDER}, {spec.vocab_size:,} ids{remark and f'; {remark}'}"


def _refuse_run(run: Path, config: Path) -> None:
    """ValueError where it is a run already, be it one that waits in a queue and holds no lock."""
    for there in (*checkpoints(run)[-1:], config):
        if there.exists():
            raise ValueError(f"run={run} has {there.name}: choose another folder")


def training(found: HFModel, run: Path, settings: list[str]) -> JobConfig:
    """The settings of a training of that model. ValueError where a setting says what the model tells."""
    for setting in settings:
        key = setting.partition("=")[0].lstrip("+~")
        if any(key == told or key.startswith(f"{told}.") for told in SET_BY_MODEL):
            raise ValueError(f"{key} is told by hf= and run=, and not to be given")
    register_groups()
    composed = compose_settings("train", settings)
    OmegaConf.set_struct(composed, False)
    composed.model = OmegaConf.create(asdict(found.model))
    composed.vocab.update(found.family.vocab)
    composed.vocab.tie, composed.vocab.size, composed.run.dir = found.tie, found.vocab_size, str(run)
    if not composed.data.path and not composed.data.corpora:
        composed.data.path = "no data"
    return build_config(composed)


def streams(found: HFModel, multiple: int) -> list[Streamed]:
    """Our tensors, in fp32; the matrix with its rows of padding."""
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


def export_model(arguments: list[str]) -> Iterator[str]:
    """Makes OUT of a run's checkpoint; yields what to print."""
    given, _ = _given(arguments, ("run", "out", "step", "dtype", "materialize_head"))
    run, out = Path(_needed(given, "run")), Path(_needed(given, "out"))
    dtype, head = given.get("dtype", "fp32"), given.get("materialize_head", "false")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} must be one of {', '.join(DTYPES)}")
    if head not in ("true", "false"):
        raise ValueError(f"materialize_head={head} must be true or false")
    step = given.get("step")
    if step is not None and not step.isdecimal():
        raise ValueError(f"step={step} must be a whole number")
    checkpoint = CheckpointRows(checkpoint_of(run, None if step is None else int(step)))
    check_files(checkpoint.folder, checkpoint.manifest)
    config = build_config(OmegaConf.create(checkpoint.manifest["config"]))
    theirs = VocabConfig(**FAMILIES[config.model.family].vocab)
    if config.vocab.softcap != theirs.softcap:
        capped = "would not cap logits" if theirs.softcap is None else f"caps logits at {theirs.softcap}"
        raise ValueError(f"vocab.softcap={config.vocab.softcap} cannot be exported: transformers {capped}")
    tokenizer = run / TOKENIZER_FOLDER
    spec = TokenizerSpec.load(tokenizer) if tokenizer.is_dir() else None
    scale, special = config.vocab.embed_scale / theirs.embed_scale, SpecialTokens.of_run(run)
    count = export(checkpoint, config.model, spec, out, DTYPES[dtype], head == "true", scale, special)
    yield f"{out}: {checkpoint.folder}, {count / 1e6:,.1f}M parameters in {dtype}"
    if spec is None:
        yield f"no tokenizer: {run} has none"


COMMANDS: dict[str, Callable[[list[str]], Iterator[str]]] = {"import": import_model, "export": export_model}


def _given(arguments: list[str], keys: tuple[str, ...], others: bool = False) -> tuple[dict[str, str], list[str]]:
    """By key, and the rest."""
    given, rest = {}, []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key in keys and equals:
            given[key] = value
        elif others and equals:
            rest.append(argument)
        else:
            raise ValueError(f"{argument!r} must be {'=, '.join(keys)}=; see --help")
    return given, rest


def _needed(given: dict[str, str], key: str) -> str:
    if not given.get(key):
        raise ValueError(f"{key}= is missing; see --help")
    return given[key]


if __name__ == "__main__":
    main()
