"""`resume=RUN`: the frozen settings of a run, overridden by the command line. Used by both launchers.

Hydra composes the command line on the run's own engine, optimizer and model family, which checks it. `apply` then sets
the typed settings on the frozen ones.
"""

from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf

from data_prep.errors import nearest
from data_prep.overrides import home, with_new_names
from pretrain.compose import PARTS, TOP_LEVEL_KEYS, load_config
from pretrain.config.job import CONFIG_FILE
from pretrain.config.optim import OptimConfig

FAMILY = "family/"  # prefix of the option with only a family's keys
RECIPE = "recipe"  # group of conf/recipe: values of many groups, frozen with the others
NAMED = ("engine", "optim")  # groups whose options have different keys; each option has its own name as `name`


def in_full(arguments: list[str]) -> list[str]:
    """Returns the command line; to resume a run, puts the choices that Hydra needs in front.

    `run.dir=RUN` of an existing run also resumes it, if the command names no data: a new run needs some. Raises
    ValueError if there is no run.
    """
    typed = {_key(argument): _value(argument) for argument in arguments if "=" in argument}
    run = typed.get("resume")
    names_data = any(key.partition(".")[0] == "data" for key in typed)
    if run is None and "run.dir" in typed and not names_data and (_config_of(typed["run.dir"])).is_file():
        run = typed["run.dir"]
    if run is None or run == "null":
        return arguments
    frozen = _frozen(run)
    first = next(i for i, argument in enumerate(arguments) if _key(argument) in typed and "=" in argument)
    named = {group: frozen[group].name for group in NAMED}
    needed = {"resume": run, **named, "model": f"{FAMILY}{frozen.model.family}"}
    return arguments[:first] + [f"{k}={v}" for k, v in needed.items() if k not in typed] + arguments[first:]


def apply(composed: DictConfig, overrides: list[str]) -> None:
    """Removes `resume`, and replaces the composed settings by the run's, overridden by the typed ones."""
    frozen = _changed(composed, overrides)
    composed.pop("resume", None)
    for name in map(str, frozen):
        composed[name] = frozen[name]


def settings(composed: DictConfig, overrides: list[str]) -> tuple[DictConfig, str]:
    """Returns the settings of the run to resume, overridden by the typed ones, and the file that has them."""
    run = composed.get("resume")
    return _changed(composed, overrides), "" if run is None else str(Path(run) / CONFIG_FILE)


def _changed(composed: DictConfig, overrides: list[str]) -> DictConfig:
    """The settings of the run, overridden by the typed ones; empty if no run is resumed."""
    run = composed.get("resume")
    if run is None:
        return OmegaConf.create()
    frozen = _frozen(run)
    if recipe := next((override for override in overrides if _key(override) == RECIPE), None):
        raise ValueError(
            f"{recipe.lstrip('+')} must be left out with resume={run}: the run has its own settings;"
            " name the keys to change"
        )
    for override in overrides:
        key, value = _key(override), _value(override)
        part = key.partition(".")[0]
        if part not in PARTS and part not in TOP_LEVEL_KEYS:
            continue
        if key in PARTS:  # a choice of a group; the run's own changes nothing
            if not value.startswith(FAMILY) and not (key in NAMED and value == frozen[key].name):
                frozen[key] = composed[key]
        else:
            OmegaConf.update(frozen, key, OmegaConf.select(composed, key), force_add=True)
    if Path(frozen.run.dir).absolute() != Path(run).absolute() and any(map(_names_folder, overrides)):
        raise ValueError(
            f"run.dir={frozen.run.dir} must be left out, or be resume={run}: a run cannot be resumed in another folder"
        )
    frozen.run.dir = run
    return frozen


def _key(argument: str) -> str:
    return argument.partition("=")[0].lstrip("+~")


def _value(argument: str) -> str:
    """Returns the value without Hydra's quotes."""
    return argument.partition("=")[2].strip("'\"")


def _names_folder(override: str) -> bool:
    return _key(override) == "run.dir"


def _config_of(run: str) -> Path:
    return Path(home("resume", run)) / CONFIG_FILE


def _frozen(run: str) -> DictConfig:
    """Reads and checks the settings of a run."""
    path = _config_of(run)
    if not path.is_file():
        raise ValueError(f"resume={run} must be the folder of a run: {path} is missing{nearest(path.parent, '; ')}")
    load_config(path)
    frozen = with_new_names(OmegaConf.create(yaml.safe_load(path.read_bytes())))
    frozen.optim.setdefault("name", OptimConfig.name)  # older runs have no name there
    return frozen
