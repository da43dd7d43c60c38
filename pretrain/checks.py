"""Checks a run before its ranks start, and finds out if anything is left to train.

The settings check themselves; this module checks them against device, data and the run's folder.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_prep.durable import check_file, check_folder
from data_prep.token_file import TOKENIZER_FOLDER

from .checkpoint import (
    CheckpointError,
    DamagedCheckpoint,
    check_files,
    checkpoints,
    newest_manifest,
    read_manifest,
    step_of,
)
from .checkpoint.resume import check_resumable, check_stable
from .compilers import check_compilers
from .config.engine import DeepSpeedConfig, FSDP2Config
from .config.evaluation import check_tasks
from .config.job import CONFIG_FILE, JobConfig
from .corpora import check_room, share_of_node, validation_windows, vocab_rows
from .data import Data, open_data
from .evaluate.tasks import check_names
from .exits import RESTARTS_FILE
from .interop.initial import check_initial
from .locks import LAUNCH_LOCK, RANKS_LOCK

Warn = Callable[[str], None]
Settled = tuple[Data, int, str]  # data, rows of the vocabulary, and a warning about what could not be checked


def check_job(
    config: JobConfig,
    world: int,
    device_type: str,
    bf16: bool | None = None,
    warn: Warn = lambda _: None,
    environment: Mapping[str, str] | None = None,
    settled: Settled | None = None,
) -> Data:
    """Checks all that can be checked before a process group starts. Raises ValueError if something is wrong.

    Checks the number of ranks against batch and vocabulary, precision and engine against the device, the data and its
    tokenizer, and the weights that the run begins with, a checkpoint's or those of `init_from`. bf16: native support of
    a device elsewhere; None: this machine's. warn: called with what could not be checked. environment: of the ranks, if
    they run here: then the cache of a store must have room, too. settled: the result of `check_settings`, if it was
    called before.
    """
    if isinstance(config.engine, FSDP2Config):
        config.engine.check_device(device_type)
    config.train.check_world(world)
    config.vocab.check_world(world)
    config.profile.check_world(world)
    check_tasks("eval.", config.eval.tasks, config.eval.tasks_path)
    data, rows, unchecked = settled or check_settings(config, world)
    if config.eval.tasks:
        if data.tokenizer is None:
            raise ValueError(f"eval.tasks={','.join(config.eval.tasks)} need the tokenizer of the data: it has none")
        if config.eval.tasks_path:  # to list lm-eval's own tasks takes it half a minute
            check_names("eval.", config.eval.tasks, config.eval.tasks_path)
    group = _check_with_torch(config, rows, world, device_type, bf16, environment)
    if environment is not None:
        local = int(environment.get("LOCAL_WORLD_SIZE", world))
        check_room(config, data, share_of_node(local, group, world))
    if unchecked:
        warn(unchecked)
    return data


def check_settings(config: JobConfig, world: int | None) -> Settled:
    """Does the part of `check_job` that needs neither torch nor a device. world: number of ranks; None: unknown.

    Returns the data, the rows of the vocabulary, and a warning about what could not be checked, or "".
    """
    check_folder(f"run.dir={config.run.dir}", config.run_dir / "checkpoints")
    if world is not None:
        config.train.check_world(world)
        config.vocab.check_world(world)
        config.profile.check_world(world)
    config.optim.check_steps(config.train.steps)
    config.log.check_targets()
    data = open_data(config.data)
    if config.monitor.lens_every and not validation_windows(config, data):
        raise ValueError(f"monitor.lens_every={config.monitor.lens_every} must be 0: the data has no validation split")
    rows = vocab_rows(config, data)
    try:
        saved = newest_manifest(config.run_dir)  # the ranks will verify the files, and fall back if needed
    except CheckpointError as error:
        raise ValueError(str(error)) from error
    return data, rows, _check_weights(config, data, rows, saved)


def _check_weights(config: JobConfig, data: Data, rows: int, saved: dict[str, Any] | None) -> str:
    """Checks the initial weights: the manifest's checkpoint, `decay_from` or `init_from`. Returns a warning, or ""."""
    if saved is None and config.decay_from is not None:
        try:
            stable = read_manifest(Path(config.decay_from))
        except CheckpointError as error:
            raise ValueError(f"decay_from={config.decay_from} cannot be read: {error}") from error
        check_stable(config, stable)
        check_resumable(config, data, rows, stable, "decay_from")
    elif saved is not None:
        check_resumable(config, data, rows, saved)
        if saved.get("weights_only", False) and saved["tokenizer_fingerprint"] is None:
            return f"run.dir={config.run.dir} was imported without a tokenizer: it cannot be compared with the data's"
    elif config.init_from is not None:
        return check_initial(config.init_from, config.model, config.vocab, rows, data.tokenizer)
    return ""


def _check_with_torch(
    config: JobConfig,
    rows: int,
    world: int,
    device_type: str,
    bf16: bool | None,
    environment: Mapping[str, str] | None,
) -> int:
    """Checks the rules that need torch. They come last, because its import takes longer than all others.

    Returns the number of ranks of a vocab group.
    """
    from .build import vocab_parallel
    from .precision import compute_dtype

    compute_dtype(config.train, device_type, bf16)
    if isinstance(config.engine, DeepSpeedConfig) and config.engine.extra:
        from .engine.deepspeed import check_extra

        check_extra(config.engine)
    if environment is not None:
        compiles = isinstance(config.engine, FSDP2Config) and config.engine.compile
        check_compilers(device_type, compiles, config.data.masked, environment)
    node = int((environment or {}).get("LOCAL_WORLD_SIZE", world))
    return vocab_parallel(config, rows, world, node, device_type, bf16).ranks


def check_logs(config: JobConfig, environment: Mapping[str, str] | None = None) -> None:
    """Raises ValueError if the run could not write its logs. For launchers: a running training continues without.

    environment: of the launcher, where W&B needs a key; None: not checked.
    """
    config.log.check_targets(environment)
    key, run = f"run.dir={config.run.dir}", config.run_dir
    check_folder(key, run / TOKENIZER_FOLDER)
    for file in (CONFIG_FILE, "metrics.jsonl", RESTARTS_FILE, LAUNCH_LOCK, RANKS_LOCK):
        check_file(key, run / file)


def finished(config: JobConfig, data: Data) -> str | None:
    """Returns one line if there is nothing left to train, evaluate or repair; else None.

    Verifies the newest checkpoint's hashes: if it is damaged, the ranks fall back to the one before.
    """
    newest = next(reversed(checkpoints(config.run_dir)), None)
    if newest is None or step_of(newest) < config.train.last_step:
        return None
    step, steps, every = step_of(newest), config.train.steps, config.eval.every
    evaluates = data.bytes_of_ids is not None and validation_windows(config, data)
    due = step == steps or (every and step % every == 0)
    try:
        saved = read_manifest(newest)
        if saved.get("weights_only") or (evaluates and due and saved.get("val_loss") is None):
            return None  # imported, or a stop ended the evaluation early
        check_files(newest, saved)
    except DamagedCheckpoint:
        return None
    return reached(config, step)


def reached(config: JobConfig, step: int) -> str:
    """Returns one line on a run that is at its last step or beyond: which setting stops it there."""
    if step >= config.train.steps:
        return f"{config.run.dir} is finished ({step} of {config.train.steps} steps); a larger train.steps continues it"
    return (
        f"{config.run.dir} has reached train.stop_after={config.train.stop_after}"
        f" (step {step} of {config.train.steps}); train.stop_after=null continues it"
    )
