"""Imports, exports and uploads Hugging Face models: `python -m pretrain.interop.hf --help`.

Runs in one process, which never holds the whole matrix.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from omegaconf import OmegaConf

from data_prep.arguments import key_values
from data_prep.command import arguments_or, compose_settings, one_line
from data_prep.durable import check_new

from ..checkpoint import CheckpointError, check_weights, checkpoint_of, checkpoints, read_manifest
from ..compose import build_config, register_groups
from ..config.ema import WEIGHTS, check_choice
from ..config.job import JobConfig
from ..families import FAMILIES, hugging_face_types
from ..interop.folder import HFModel
from ..interop.hub import push
from ..interop.initial import tokenizer_of
from ..locks import LAUNCH_LOCK, check_free, lock_run

NAMES = ", ".join(family.hugging_face.model_types[kind] for kind, family in hugging_face_types().items())
HELP = f"""Imports, exports and uploads Hugging Face models: {NAMES}; safetensors only, never a pickle.

  python -m pretrain.interop.hf import hf=DIR run=RUN               makes a run with this model as step 0
  python -m pretrain.interop.hf import hf=DIR run=RUN seed=1 …      with settings of the training
  python -m pretrain.interop.hf export run=RUN out=DIR              writes the newest checkpoint for transformers
  python -m pretrain.interop.hf export run=RUN out=DIR step=500 dtype=bf16 materialize_head=true
  python -m pretrain.interop.hf push folder=DIR repo=OWNER/NAME     uploads an exported folder to the hub

dtype: fp32 (the main weights unchanged), bf16 or fp16. materialize_head: writes the output matrix of a tied model, too,
for readers that expect one. To continue training a model, init_from=hf:DIR in launch/local.py is enough.
"""
IMPORT_KEYS = {
    "hf": "folder of the model: config.json and safetensors",
    "run": "folder of the run to write; it must not be a run already",
}
EXPORT_KEYS = {
    "run": "folder of the run",
    "out": "folder to write",
    "step": "step of the checkpoint; default: the newest",
    "weights": "last: the weights of the step (default); ema: their running average, see ema.decay",
    "dtype": "type of the weights: fp32 (default), bf16 or fp16",
    "materialize_head": "true: write lm_head.weight for a tied model, too; default: false",
}
PUSH_KEYS = {
    "folder": "folder that was exported",
    "repo": "repository on the hub: OWNER/NAME; created if it does not exist",
    "private": "false: a new repository is public; default: true",
}
DTYPES = ("fp32", "bf16", "fp16")  # of export.py, which needs torch
SET_BY_MODEL = ("model", *(f"vocab.{key}" for key in ("size", "tie", "softcap", "embed_scale")), "run.dir", "init_from")


def main() -> None:
    """Runs the command. Exits with 0, or with 2 and one line if the command, folder or model is wrong."""
    with one_line(CheckpointError):
        arguments = arguments_or(HELP)
        if arguments[0] not in COMMANDS:
            raise ValueError(f"{arguments[0]} must be one of {', '.join(COMMANDS)}; see --help")
        for line in COMMANDS[arguments[0]](arguments[1:]):
            print(line, flush=True)


def import_model(arguments: list[str]) -> Iterator[str]:
    """Imports a folder as a run; yields what to print."""
    given = key_values(arguments, form="hf=, run=")
    source, run = Path(_needed(given, "hf")), Path(_needed(given, "run"))
    check_free(run, LAUNCH_LOCK)
    found = HFModel(source)
    tokenizer = tokenizer_of(found)
    config = training(found, run, [one for one in arguments if one.partition("=")[0] not in IMPORT_KEYS])
    with lock_run(run, LAUNCH_LOCK):
        refuse_run(run, config.path)
        from .convert import import_folder  # needs torch

        yield from import_folder(found, tokenizer, config)


def training(found: HFModel, run: Path, settings: list[str]) -> JobConfig:
    """Settings for training this model. Raises ValueError for a setting that the model determines."""
    for setting in settings:
        key = setting.partition("=")[0].lstrip("+~")
        if any(key == known or key.startswith(f"{known}.") for known in SET_BY_MODEL):
            raise ValueError(f"{key} must not be given: hf= and run= determine it")
    register_groups()
    composed = compose_settings("train", settings)
    OmegaConf.set_struct(composed, False)
    composed.model = OmegaConf.create(asdict(found.model))
    composed.vocab.update(found.family.vocab)
    composed.vocab.tie, composed.vocab.size, composed.run.dir = found.tie, found.vocab_size, str(run)
    if not composed.data.path and not composed.data.corpora:
        composed.data.path = "no data"
    return build_config(composed)


def refuse_run(run: Path, config: Path) -> None:
    """Raises ValueError if `run` is already a run, even one that waits in a queue and holds no lock."""
    for there in (*checkpoints(run)[-1:], config):
        if there.exists():
            raise ValueError(f"run={run} must be new, but has {there.name}; choose another folder")


def export_model(arguments: list[str]) -> Iterator[str]:
    """Exports a checkpoint of a run; yields what to print."""
    given = key_values(arguments, EXPORT_KEYS, f"{'=, '.join(EXPORT_KEYS)}=")
    run, out = Path(_needed(given, "run")), Path(_needed(given, "out"))
    dtype, head = given.get("dtype", "fp32"), given.get("materialize_head", "false")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} must be one of {', '.join(DTYPES)}")
    if head not in ("true", "false"):
        raise ValueError(f"materialize_head={head} must be true or false")
    step = given.get("step")
    if step is not None and not step.isdecimal():
        raise ValueError(f"step={step} must be a whole number")
    folder, weights = checkpoint_of(run, None if step is None else int(step)), given.get("weights", "last")
    manifest = read_manifest(folder)
    check_choice(weights)
    check_weights(folder, manifest, weights)
    config = build_config(OmegaConf.create(manifest["config"]))
    theirs = FAMILIES[config.model.family].vocab.get("softcap")
    if config.vocab.softcap != theirs:
        capped = "would not cap logits" if theirs is None else f"caps logits at {theirs}"
        raise ValueError(f"vocab.softcap={config.vocab.softcap} cannot be exported: transformers {capped}")
    check_new(out)
    from ..checkpoint.rows import CheckpointRows  # needs torch, as does the next
    from .convert import export_run

    yield from export_run(CheckpointRows(folder, WEIGHTS[weights]), config, run, out, dtype, head == "true")


def push_model(arguments: list[str]) -> Iterator[str]:
    """Uploads an exported folder; yields what to print."""
    given = key_values(arguments, PUSH_KEYS, f"{'=, '.join(PUSH_KEYS)}=")
    folder, repo, private = Path(_needed(given, "folder")), _needed(given, "repo"), given.get("private", "true")
    if private not in ("true", "false"):
        raise ValueError(f"private={private} must be true or false")
    yield f"pushed: {push(folder, repo, private == 'true')}"


COMMANDS: dict[str, Callable[[list[str]], Iterator[str]]] = {
    "import": import_model,
    "export": export_model,
    "push": push_model,
}


def _needed(given: dict[str, str], key: str) -> str:
    if not given.get(key):
        raise ValueError(f"{key}= is missing; see --help")
    return given[key]


if __name__ == "__main__":
    main()
