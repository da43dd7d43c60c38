"""`resume=RUN`: the frozen settings of a run, with what is typed on top.

Apart from the launchers because both take it. Hydra composes what is typed, and so checks it, over the run's own
engine, optimizer and family of models; `apply` then puts the typed settings onto the frozen ones.
"""

from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf

from data_prep.overrides import home, with_new_names
from pretrain.compose import PARTS, TOP_LEVEL_KEYS, load_config
from pretrain.config.job import CONFIG_FILE
from pretrain.config.optim import OptimConfig

FAMILY = "family/"  # begins the name of the option that has a family's keys alone
RECIPE = "recipe"  # group of conf/recipe: values of many groups, frozen with the others
NAMED = ("engine", "optim")  # groups whose options differ in their keys, each named as its option


def in_full(arguments: list[str]) -> list[str]:
    """The command line with the choices that Hydra needs in front, if a run is to be resumed with its own settings.

    `run.dir=RUN` of an existing run means the same if no data is named: a command that begins a run names some.
    Raises ValueError if there is no such run.
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
    """Takes `resume` out, and puts the run's settings, with the typed ones on top, in place of the composed ones."""
    run = composed.pop("resume", None)
    if run is None:
        return
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
        if key in PARTS:  # a choice; the same one changes nothing
            if not value.startswith(FAMILY) and not (key in NAMED and value == frozen[key].name):
                frozen[key] = composed[key]
        else:
            OmegaConf.update(frozen, key, OmegaConf.select(composed, key), force_add=True)
    if Path(frozen.run.dir).absolute() != Path(run).absolute() and any(map(_names_folder, overrides)):
        raise ValueError(f"run.dir={frozen.run.dir} must be left out, or be resume={run}: a run is resumed where it is")
    frozen.run.dir = run
    for name in map(str, frozen):
        composed[name] = frozen[name]


def _key(argument: str) -> str:
    return argument.partition("=")[0].lstrip("+~")


def _value(argument: str) -> str:
    """Without Hydra's quotes."""
    return argument.partition("=")[2].strip("'\"")


def _names_folder(override: str) -> bool:
    return _key(override) == "run.dir"


def _config_of(run: str) -> Path:
    return Path(home("resume", run)) / CONFIG_FILE


def _frozen(run: str) -> DictConfig:
    """The settings of a run, checked as those of a start are."""
    path = _config_of(run)
    if not path.is_file():
        raise ValueError(f"resume={run} must be the folder of a run: {path} is missing")
    load_config(path)
    frozen = with_new_names(OmegaConf.create(yaml.safe_load(path.read_bytes())))
    frozen.optim.setdefault("name", OptimConfig.name)  # runs were frozen before it had one
    return frozen
