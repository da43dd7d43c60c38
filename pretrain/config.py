"""The configuration: built, frozen, read again, and checked across parts. Its dataclass is in settings.py.

Hydra composes it once, in the launching process, which freezes it to RUN/config.yaml; ranks read that file. With the
settings the only module that names concrete engines and model families, and, with the entries, to know omegaconf.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from data_prep.durable import check_file, check_folder, durable, exclusive
from data_prep.errors import headline
from data_prep.mistakes import said, unknown
from data_prep.special_tokens import KEPT_AS, SpecialTokens
from data_prep.token_file import TOKENIZER_FOLDER
from data_prep.tokenizer_spec import TokenizerSpec

from .changes import keep_older
from .checkpoint import (
    RANKS_LOCK,
    CheckpointError,
    DamagedCheckpoint,
    check_files,
    checkpoints,
    newest_manifest,
    read_manifest,
    step_of,
)
from .compilers import check_compilers
from .data import Data, Order, PackedWindows, Samples, Windows, open_data
from .engine.deepspeed import DeepSpeedConfig
from .engine.fsdp2 import FSDP2Config
from .exits import RESTARTS_FILE
from .interop import check_initial, folder_of, special_tokens
from .models.gpt2 import GPT2Config
from .models.llama import LlamaConfig
from .placement import Machine, Parallel, Workload, choose_parallel
from .settings import CONFIG_FILE, JobConfig
from .vocab import VocabConfig, VocabShard

ENGINES: dict[str, type] = {"fsdp2": FSDP2Config, "deepspeed": DeepSpeedConfig}
MODELS: dict[str, type] = {"gpt2": GPT2Config, "llama": LlamaConfig}
LAUNCH_LOCK = ".launch.lock"  # held by the launcher, as RANKS_LOCK is by rank 0


Warn = Callable[[str], None]
TOP_LEVEL_KEYS = ("seed", "init_from")  # of no group
OPTIONAL_GROUPS = {"monitor"}  # groups that frozen configurations may lack: they came later
PARTS: dict[str, type] = {item.name: item.type for item in fields(JobConfig) if item.name not in TOP_LEVEL_KEYS}  # type: ignore[misc]


def register() -> None:
    """Tells Hydra the dataclass behind each group, so that keys and types are checked while it composes."""
    store = ConfigStore.instance()
    for name, engine in ENGINES.items():
        node = OmegaConf.structured(engine)
        if "extra" in node:
            OmegaConf.set_struct(node.extra, False)  # it takes keys that we do not know
        store.store(group="engine", name=name, node=node)
    for name, model in MODELS.items():
        store.store(group="model/family", name=name, node=model)
    for group in PARTS.keys() - {"engine", "model"}:
        node = OmegaConf.structured(PARTS[group])
        for key in {"corpora", "weights", "stages"} & set(node):  # of names that we do not know
            OmegaConf.set_struct(node[key], False)
        store.store(group=group, name="default", node=node)


def build(composed: DictConfig) -> JobConfig:
    """Typed and checked settings from a composed or a frozen configuration. ValueError: key, value, rule."""
    for key in map(str, composed):
        if key not in {*TOP_LEVEL_KEYS, *PARTS}:
            raise ValueError(unknown(key, [*TOP_LEVEL_KEYS, *PARTS]))
    engine, model = composed.engine.name, composed.model.family
    if engine not in ENGINES:
        raise ValueError(f"engine.name={engine} must be one of {', '.join(ENGINES)}")
    if model not in MODELS:
        raise ValueError(f"model.family={model} must be one of {', '.join(MODELS)}")
    chosen = PARTS | {"engine": ENGINES[engine], "model": MODELS[model]}
    parts = {name: _part(name, part, _group(composed, name)) for name, part in chosen.items()}
    if type(composed.seed) is not int or composed.seed < 0:
        raise ValueError(f"seed={composed.seed} must be a whole number of at least 0")
    init_from = composed.get("init_from")
    return JobConfig(seed=composed.seed, init_from=None if init_from is None else str(init_from), **parts)


def _part(name: str, kind: type, given: Any) -> Any:
    """The dataclass of a group. ValueError: key, value, rule."""
    known = [item.name for item in fields(kind)]
    for key in map(str, given):
        if key not in known:
            raise ValueError(unknown(f"{name}.{key}", known))
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), given))
    except OmegaConfBaseException as error:
        key = str(error.full_key or error.key)
        raise ValueError(said(key if key.startswith(f"{name}.") else f"{name}.{key}", error)) from error


def _group(composed: DictConfig, name: str) -> Any:
    """A run that was frozen before a group was there has its defaults."""
    if name not in composed and name not in OPTIONAL_GROUPS:
        raise ValueError(f"{name} is missing: a configuration has {', '.join(PARTS)}")
    return composed.get(name, {})


def freeze(config: JobConfig, data: Data) -> None:
    """Writes RUN/config.yaml, whole or not at all, and a copy of the tokenizer: a run explains itself.

    If the settings have changed, the file of the start before is kept as config-0001.yaml, config-0002.yaml, ...
    """
    special = None
    if newest_manifest(config.run_dir) is None:  # else the ones that the run began with are there
        (config.run_dir / KEPT_AS).unlink(missing_ok=True)
        special = None if config.init_from is None else special_tokens(config.init_from)
    write(config, None if data.tokenizer is None else TokenizerSpec.load(data.tokenizer), special)


def write(config: JobConfig, tokenizer: TokenizerSpec | None, special: SpecialTokens | None = None) -> None:
    """Does what `freeze` does, with a tokenizer and special tokens at hand."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(config.run_dir / TOKENIZER_FOLDER)
    if special is not None:
        special.save(config.run_dir)
    keep_older(config.path, text(config))
    with durable(config.path) as file:
        file.write(text(config).encode())


def text(config: JobConfig) -> str:
    """What is frozen."""
    return OmegaConf.to_yaml(asdict(config))


@contextmanager
def lock_run(run: Path, lock: str) -> Iterator[None]:
    """Holds the run's folder for this process and its life. Raises ValueError if another one does."""
    run.mkdir(parents=True, exist_ok=True)
    with exclusive(run / lock, f"run.dir={run} is in use by another process: stop it, or choose another run.dir"):
        yield


def load(path: Path) -> JobConfig:
    """Reads a frozen configuration."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a run's configuration, such as {path / CONFIG_FILE}")
    try:
        frozen = OmegaConf.load(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: is {path.parent} a run?") from None
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ValueError(f"{path} is not YAML: {headline(error)}") from error
    if not isinstance(frozen, DictConfig):
        raise ValueError(f"{path} must hold a run's settings")
    return build(frozen)


def check(
    config: JobConfig,
    world: int,
    device_type: str,
    bf16: bool | None = None,
    warn: Warn = lambda _: None,
    environment: Mapping[str, str] | None = None,
) -> Data:
    """All that can be found wrong before a process group starts. ValueError: key, value, rule.

    The world against batch and vocabulary, precision and engine against the device, the data and its tokenizer, and
    the checkpoint that would be resumed. bf16: whether a device elsewhere computes it natively; None: it is this one.
    warn: takes a line on what could not be checked. environment: the ranks', if they run here.
    """
    check_folder(f"run.dir={config.run.dir}", config.run_dir / "checkpoints")
    config.train.check_world(world)
    config.optim.check_steps(config.train.steps)
    config.train.compute_dtype(device_type, bf16)
    config.engine.check_device(device_type)
    if environment is not None:
        compiles = isinstance(config.engine, FSDP2Config) and config.engine.compile
        check_compilers(device_type, compiles, config.data.masked, environment)
    data = open_data(config.data)
    if config.monitor.lens and not validation_windows(config, data):
        raise ValueError(f"monitor.lens={config.monitor.lens} must be 0 where the data has no validation split")
    rows = vocab_rows(config, data)
    vocab_parallel(config, rows, world, world, device_type, bf16)
    try:
        saved = newest_manifest(config.run_dir)  # the ranks will verify the files, and fall back where they must
    except CheckpointError as error:
        raise ValueError(str(error)) from error
    if saved is not None:
        _check_resumable(config, data, rows, saved)
        if saved.get("weights_only", False) and saved["tokenizer_fingerprint"] is None:
            warn(f"run.dir={config.run.dir} was imported without a tokenizer: it is not compared with the data's")
    elif config.init_from is not None:
        doubt = check_initial(config.init_from, config.model, config.vocab, rows, data.tokenizer)
        if doubt:
            warn(doubt)
    return data


def check_logs(config: JobConfig) -> None:
    """DataError if what a run writes besides checkpoints could not be. For the launcher: a run goes on without it."""
    key, run = f"run.dir={config.run.dir}", config.run_dir
    for folder in (TOKENIZER_FOLDER, *(["tensorboard"] if config.log.tensorboard else [])):
        check_folder(key, run / folder)
    for file in (CONFIG_FILE, "metrics.jsonl", RESTARTS_FILE, LAUNCH_LOCK, RANKS_LOCK):
        check_file(key, run / file)


def finished(config: JobConfig, data: Data) -> str | None:
    """One line if there is nothing left to train, evaluate or repair; else None.

    Reads the newest checkpoint against its hashes: if it is damaged, the ranks fall back to the one before.
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
            return None  # imported, or a stop has cut the evaluation short
        check_files(newest, saved)
    except DamagedCheckpoint:
        return None
    if step >= steps:
        return f"{config.run.dir} is finished ({step} of {steps} steps); a larger train.steps goes further"
    return (
        f"{config.run.dir} has reached train.stop_after={config.train.stop_after} (step {step} of {steps});"
        " train.stop_after=null goes further"
    )


def vocab_rows(config: JobConfig, data: Data) -> int:
    """V: vocab.size, or the tokenizer's where it is null."""
    size, needed = config.vocab.size, data.vocab_size
    if size is None and needed is None:
        raise ValueError("vocab.size=null must be given: the data brings no tokenizer")
    if size is not None and needed is not None and size < needed:
        raise ValueError(f"vocab.size={size} must be at least {needed}, the rows of the tokenizer in {data.tokenizer}")
    rows = size if size is not None else needed
    assert rows is not None
    return rows


def vocab_parallel(
    config: JobConfig, rows: int, world: int, node: int, device_type: str, bf16: bool | None = None
) -> Parallel:
    """The size of the vocab axis for `world` ranks, `node` of them on each node, and why. As `check`."""
    work = vocab_workload(config, rows, world, config.train.compute_dtype(device_type, bf16).itemsize)
    return choose_parallel(config.vocab.parallel, work, Machine.of(device_type, world, node))


def vocab_workload(config: JobConfig, rows: int, world: int, itemsize: int) -> Workload:
    """What a rank's matrix has to do in a step, `itemsize` bytes to a number of the compute dtype."""
    return Workload(
        rows=VocabShard.of(0, 1, rows, config.vocab.multiple).padded_size,
        width=config.model.width,
        matrices=config.vocab.matrices,
        tokens=config.train.micro_batch * config.seq_len,
        micro_batches=config.train.global_batch // (config.train.micro_batch * world),
        itemsize=itemsize,
        smoothing=config.vocab.label_smoothing > 0,
    )


def samples(config: JobConfig, data: Data) -> Samples:
    """The windows of the data's corpora, in the order of the run."""
    sources = {}
    for title, corpus in data.corpora.items():
        if config.data.packing == "best_fit":
            windows: Windows = PackedWindows(corpus.train, config.seq_len)
        else:
            windows = Windows(corpus.train, config.seq_len, masked=config.data.masked)
        if not len(windows):
            raise ValueError(f"data.path={config.data.paths[title]}: no document has two tokens to pack")
        sources[title] = windows, Order(len(windows), config.seed, corpus.name)
    return Samples(sources, data.blend)


def validation_windows(config: JobConfig, data: Data) -> dict[str, Windows]:
    """The windows of the validation splits, by the titles of the corpora that have any."""
    windows = {t: Windows(c.val, config.seq_len, masked=config.data.masked) for t, c in data.corpora.items()}
    return {title: of for title, of in windows.items() if len(of)}


def about(config: JobConfig, data: Data) -> dict[str, Any]:
    """What a checkpoint says of the run it is of."""
    return {
        "config": asdict(config),
        "vocab_size": vocab_rows(config, data),
        "tokenizer_fingerprint": data.tokenizer_fingerprint,
    }


def _check_resumable(config: JobConfig, data: Data, rows: int, manifest: dict[str, Any]) -> None:
    """The model, its vocabulary and the order of the data belong to a run; the rest may change.

    When a tied matrix is split may change as long as it is still to come. Of weights that were imported no sample has
    been drawn: then the data's order is free, and of the tokenizer what the rows mean must stay.
    """
    saved, now = manifest["config"], asdict(config)
    known_then = {  # a key that came later was at its default
        "model": asdict(type(config.model)()) | saved["model"],
        "vocab": asdict(VocabConfig()) | saved["vocab"],
    }
    saved = saved | known_then
    drawn = not manifest.get("weights_only", False)
    kept = [("seed",), ("train", "seq_len"), ("data", "packing")] if drawn else []
    kept += [("vocab", key) for key in ("multiple", "tie", "softcap", "embed_scale")]
    kept += [("model", key) for key in now["model"]]
    for path in kept:
        was, is_ = saved, now
        for key in path:
            was, is_ = was.get(key), is_[key]
        if was != is_:
            _refuse(config, f"{'.'.join(path)}={was}", f"{is_}")
    began = saved.get("init_from")
    if config.init_from is not None and (began is None or folder_of(began) != folder_of(config.init_from).absolute()):
        _refuse(config, f"init_from={began or 'null'}", config.init_from)
    step, was_untied = manifest["step"], VocabConfig(untie_at=saved["vocab"]["untie_at"])
    if config.vocab.tie == "tied" and config.vocab.untied_at(step) != was_untied.untied_at(step):
        before, now_at = ("null" if at is None else at for at in (was_untied.untie_at, config.vocab.untie_at))
        _refuse(config, f"vocab.untie_at={before} at step {step}", f"{now_at}")
    if manifest["vocab_size"] != rows:
        _refuse(config, f"{manifest['vocab_size']} vocabulary rows", str(rows))
    if manifest["tokenizer_fingerprint"] != data.tokenizer_fingerprint and (drawn or not _same_rows(config, data)):
        _refuse(config, f"tokenizer {manifest['tokenizer_fingerprint']}", f"{data.tokenizer_fingerprint}")


def _same_rows(config: JobConfig, data: Data) -> bool:
    """Of data and run, as far as both have a tokenizer."""
    of_run = config.run_dir / TOKENIZER_FOLDER
    if data.tokenizer is None or not of_run.is_dir():
        return True
    return TokenizerSpec.load(of_run).has_rows_of(TokenizerSpec.load(data.tokenizer))


def _refuse(config: JobConfig, was: str, now: str) -> None:
    raise ValueError(
        f"run.dir={config.run.dir} holds a run with {was}, this command says {now}: choose another run.dir, or the"
        " settings of that run"
    )
