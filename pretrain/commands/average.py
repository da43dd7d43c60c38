"""Writes the average of checkpoints as a run. Separate from the command checkpoint.py because it needs torch."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from omegaconf import OmegaConf

from data_prep.durable import durable, durable_folder
from data_prep.special_tokens import KEPT_AS
from data_prep.token_file import TOKENIZER_FOLDER

from ..checkpoint import check_files, step_of
from ..checkpoint.average import averaged
from ..checkpoint.rows import CheckpointRows, save_weights
from ..compose import build_config, config_text
from ..config.job import CONFIG_FILE, JobConfig
from ..interop.folder import OUTPUT
from ..locks import RANKS_LOCK


def write_average(folders: Sequence[Path], factors: Sequence[float], run: Path, out: Path) -> str:
    """Averages checkpoints of `run` into step 0 of a new run in `out`; returns the last line to print.

    The folder `out` appears when it is complete. Raises CheckpointError if a checkpoint is damaged, ValueError if they
    are not of one model, DataError if `out` exists, OSError if the disk is full.
    """
    found = [CheckpointRows(folder) for folder in folders]
    tensors = averaged(found, factors)
    for checkpoint in found:
        check_files(checkpoint.folder, checkpoint.manifest)
    last, steps = found[-1].manifest, [step_of(folder) for folder in folders]
    config = settings_of_average(
        build_config(OmegaConf.create(last["config"])), out, any(one.name == OUTPUT for one in tensors)
    )
    about = {key: last[key] for key in ("vocab_size", "tokenizer_fingerprint")} | {
        "config": asdict(config),
        "average": {"run": str(run), "steps": steps, "weights": [factor / sum(factors) for factor in factors]},
    }
    with durable_folder(out) as unfinished:

        def describe() -> None:
            with durable(unfinished / CONFIG_FILE) as file:
                file.write(config_text(config).encode())
            if (run / TOKENIZER_FOLDER).is_dir():
                shutil.copytree(run / TOKENIZER_FOLDER, unfinished / TOKENIZER_FOLDER)
            if (run / KEPT_AS).is_file():
                shutil.copy(run / KEPT_AS, unfinished / KEPT_AS)

        saved = save_weights(unfinished, tensors, about, describe, "average")
        (unfinished / RANKS_LOCK).unlink(missing_ok=True)
    count = sum(tensor.bytes for tensor in tensors) // 4
    between = f"steps {steps[0]:,} to {steps[-1]:,}"
    place = out / saved.relative_to(unfinished)
    return f"{place}: average of {len(steps)} checkpoints, {between}, {count / 1e6:,.1f}M numbers"


def settings_of_average(config: JobConfig, out: Path, untied: bool) -> JobConfig:
    """Settings of a run that begins with the average: a split matrix is untied from its start."""
    tie = "untied" if untied else config.vocab.tie
    vocab = replace(config.vocab, tie=tie, untie_at=None)
    return replace(config, vocab=vocab, run=replace(config.run, dir=str(out)), init_from=None, decay_from=None)
