"""The configuration: composed by Hydra, built, frozen to a file, and read again.

Hydra composes it once, in the launcher, which freezes it to RUN/config.yaml; the ranks read that file. Apart from the
commands this is the only module that uses omegaconf.
"""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from data_prep.durable import durable
from data_prep.errors import headline, nearest
from data_prep.mistakes import said, unknown
from data_prep.overrides import with_new_names
from data_prep.special_tokens import KEPT_AS, SpecialTokens
from data_prep.token_file import TOKENIZER_FOLDER
from data_prep.tokenizer_spec import TokenizerSpec

from .changes import keep_older
from .checkpoint import newest_manifest
from .config.engine import ENGINES
from .config.job import CONFIG_FILE, JobConfig
from .config.optim import OPTIMIZERS, OptimConfig
from .data import Data
from .families import FAMILIES
from .interop.initial import special_tokens

TOP_LEVEL_KEYS = ("seed", "init_from", "decay_from")  # outside of all groups
OPTIONAL_GROUPS = {"ema", "guard", "monitor", "profile"}  # older frozen configurations may lack these groups
PARTS: dict[str, type] = {item.name: item.type for item in fields(JobConfig) if item.name not in TOP_LEVEL_KEYS}  # type: ignore[misc]


def register_groups() -> None:
    """Registers each group's dataclass with Hydra, so that keys and types are checked during composition."""
    store = ConfigStore.instance()
    for name, engine in ENGINES.items():
        node = OmegaConf.structured(engine)
        if "extra" in node:
            OmegaConf.set_struct(node.extra, False)  # it accepts any key
        store.store(group="engine", name=name, node=node)
    for name, family in FAMILIES.items():
        if not family.vocab:
            store.store(group="model/family", name=name, node=family.config)
            continue
        store.store(group="model/settings", name=name, node=family.config)
        store.store(group="vocab/family", name=name, node=family.vocab)
        both = [f"/model/settings/{name}@_here_", f"/vocab/family/{name}@_global_.vocab"]
        store.store(group="model/family", name=name, node={"defaults": both})
    for name, optim in OPTIMIZERS.items():
        store.store(group="optim/algorithm", name=name, node=optim)
    store.store(group="optim", name="default", node=OptimConfig)  # the group's former only option
    for group in PARTS.keys() - {"engine", "model", "optim"}:
        node = OmegaConf.structured(PARTS[group])
        for key in {"corpora", "weights", "stages", "batch_schedule"} & set(node):  # these accept any key
            OmegaConf.set_struct(node[key], False)
        store.store(group=group, name="default", node=node)


def build_config(composed: DictConfig) -> JobConfig:
    """Builds typed, checked settings from a composed or frozen configuration. Raises ValueError if one is wrong."""
    composed = with_new_names(composed)
    for key in map(str, composed):
        if key not in {*TOP_LEVEL_KEYS, *PARTS}:
            raise ValueError(unknown(key, [*TOP_LEVEL_KEYS, *PARTS]))
    engine, model = composed.engine.name, composed.model.family
    optim = composed.get("optim", {}).get("name", OptimConfig.name)  # older runs have no name there
    if engine not in ENGINES:
        raise ValueError(f"engine.name={engine} must be one of {', '.join(ENGINES)}")
    if model not in FAMILIES:
        raise ValueError(f"model.family={model} must be one of {', '.join(FAMILIES)}")
    if optim not in OPTIMIZERS:
        raise ValueError(f"optim.name={optim} must be one of {', '.join(OPTIMIZERS)}")
    chosen = PARTS | {"engine": ENGINES[engine], "model": FAMILIES[model].config, "optim": OPTIMIZERS[optim]}
    parts = {name: _part(name, part, _group(composed, name)) for name, part in chosen.items()}
    if type(composed.seed) is not int or composed.seed < 0:
        raise ValueError(f"seed={composed.seed} must be a whole number of at least 0")
    for key in ("init_from", "decay_from"):
        value = composed.get(key)
        parts[key] = None if value is None else str(value)
    return JobConfig(seed=composed.seed, **parts)


def _part(name: str, kind: type, given: Any) -> Any:
    """Builds the dataclass of a group. Raises ValueError if a setting is wrong."""
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
    """Returns a group's settings. If an older frozen run lacks an optional group: none, which means its defaults."""
    if name not in composed and name not in OPTIONAL_GROUPS:
        raise ValueError(f"{name} is missing: a configuration has {', '.join(PARTS)}")
    return composed.get(name, {})


def freeze(config: JobConfig, data: Data) -> None:
    """Writes RUN/config.yaml atomically, and a copy of the tokenizer, so that a run is self-contained.

    If the settings have changed, the former file is kept as config-0001.yaml, config-0002.yaml, ...
    """
    special = None
    if newest_manifest(config.run_dir) is None:  # otherwise the run has its own already
        (config.run_dir / KEPT_AS).unlink(missing_ok=True)
        if config.init_from is not None:
            special = special_tokens(config.init_from)
    write_config(config, None if data.tokenizer is None else TokenizerSpec.load(data.tokenizer), special)


def write_config(config: JobConfig, tokenizer: TokenizerSpec | None, special: SpecialTokens | None = None) -> None:
    """Does what `freeze` does, with a given tokenizer and special tokens."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(config.run_dir / TOKENIZER_FOLDER)
    if special is not None:
        special.save(config.run_dir)
    keep_older(config.path, config_text(config))
    with durable(config.path) as file:
        file.write(config_text(config).encode())


def config_text(config: JobConfig) -> str:
    """Returns the text of the frozen configuration."""
    return OmegaConf.to_yaml(asdict(config))


def load_config(path: Path) -> JobConfig:
    """Reads a frozen configuration."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a run's configuration, such as {path / CONFIG_FILE}")
    try:
        frozen = OmegaConf.load(path)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: is {path.parent} a run?{nearest(path.parent, ' ')}") from None
    except (YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ValueError(f"{path} is not YAML: {headline(error)}") from error
    if not isinstance(frozen, DictConfig):
        raise ValueError(f"{path} must hold a run's settings")
    return build_config(frozen)
