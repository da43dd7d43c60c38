"""`resume=RUN`: the frozen settings of a run, overridden by the command line. Used by both launchers.

`decay_from=RUN` takes them for a new run. Hydra composes the command line on the run's own engine, optimizer and model
family, which checks it. `apply` then sets the typed settings on the frozen ones.
"""

import re
from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf

from data_prep.errors import nearest
from data_prep.overrides import home, with_new_names
from pretrain.checkpoint import checkpoint_of, checkpoints
from pretrain.compose import PARTS, TOP_LEVEL_KEYS, load_config
from pretrain.config.job import CONFIG_FILE
from pretrain.config.optim import OptimConfig

FAMILY = "family/"  # prefix of the option with only a family's keys
RECIPE = "recipe"  # group of conf/recipe: values of many groups, frozen with the others
DECIDED = ("optim.lr", "optim.warmup_steps", "train.global_batch")  # null: set from the model and the length of the run
NAMED = ("engine", "optim")  # groups whose options have different keys; each option has its own name as `name`


def in_full(arguments: list[str]) -> list[str]:
    """Returns the command line; to resume a run, puts the choices that Hydra needs in front.

    `run.dir=RUN` of an existing run also resumes it, if the command names no data: a new run needs some. Raises
    ValueError if there is no run.
    """
    typed = {_key(argument): _value(argument) for argument in arguments if "=" in argument}
    run, source = typed.get("resume"), typed.get("decay_from", "null")
    names_data = any(key.partition(".")[0] == "data" for key in typed)
    if run is None and "run.dir" in typed and not names_data and (_config_of(typed["run.dir"])).is_file():
        run = typed["run.dir"]
    run = None if run == "null" else run
    if run is None and source == "null":
        return arguments
    if source != "null" and Path(typed.get("run.dir", "")).absolute() == _run_and_step(source)[0].absolute():
        raise ValueError(f"run.dir must be a new folder with decay_from={source}: that run stays as it is")
    frozen = _frozen(run) if run is not None else _frozen(str(_run_and_step(source)[0]), "decay_from")
    first = next(i for i, argument in enumerate(arguments) if _key(argument) in typed and "=" in argument)
    named = {group: frozen[group].name for group in NAMED}
    needed = ({"resume": run} if run is not None else {}) | {**named, "model": f"{FAMILY}{frozen.model.family}"}
    return arguments[:first] + [f"{k}={v}" for k, v in needed.items() if k not in typed] + arguments[first:]


def apply(composed: DictConfig, overrides: list[str]) -> None:
    """Removes `resume`, and replaces the composed settings by the run's, overridden by the typed ones."""
    frozen = _changed(composed, overrides)
    composed.pop("resume", None)
    for name in map(str, frozen):
        composed[name] = frozen[name]


def settings(composed: DictConfig, overrides: list[str]) -> tuple[DictConfig, str]:
    """Returns the settings of the run to resume or to decay, overridden by the typed ones, and the file that has
    them.
    """
    run, source = composed.get("resume"), composed.get("decay_from")
    if run is None and source is not None:
        run = str(_run_and_step(source)[0])
    return _changed(composed, overrides), "" if run is None else str(Path(run) / CONFIG_FILE)


def _changed(composed: DictConfig, overrides: list[str]) -> DictConfig:
    """The settings of the run, overridden by the typed ones; empty if no run is resumed or decays."""
    run, source = composed.get("resume"), composed.get("decay_from")
    if run is not None:
        frozen = _typed_on(_frozen(run), f"resume={run}", composed, overrides)
        if Path(frozen.run.dir).absolute() != Path(run).absolute() and any(map(_names_folder, overrides)):
            raise ValueError(
                f"run.dir={frozen.run.dir} must be left out, or be resume={run}: a run cannot be resumed in another"
                " folder"
            )
        frozen.run.dir = run
    elif source is not None:
        frozen = _frozen(str(_run_and_step(source)[0]), "decay_from")
        _refuse_steps(overrides)
        frozen.train.stop_after, frozen.run.dir = None, composed.run.dir
        frozen = _typed_on(frozen, f"decay_from={source}", composed, overrides)
    else:
        return OmegaConf.create()
    if frozen.get("decay_from") is not None:
        _refuse_steps(overrides)
    return frozen


def _refuse_steps(overrides: list[str]) -> None:
    """Raises ValueError if a decay's train.steps is typed."""
    if any(_key(override) == "train.steps" for override in overrides):
        raise ValueError(
            "train.steps must be left out with decay_from: the run ends optim.decay_steps after that checkpoint"
        )


def _typed_on(frozen: DictConfig, given: str, composed: DictConfig, overrides: list[str]) -> DictConfig:
    """Sets the typed settings on the frozen ones. given: the setting that names their run."""
    if recipe := next((override for override in overrides if _key(override) == RECIPE), None):
        raise ValueError(
            f"{recipe.lstrip('+')} must be left out with {given}: the run has its own settings; name the keys to change"
        )
    for override in overrides:
        key, value = _key(override), _value(override)
        part = key.partition(".")[0]
        if part not in PARTS and part not in TOP_LEVEL_KEYS:
            continue
        if key == "decay_from":
            frozen.decay_from = None if value == "null" else str(_checkpoint(value, frozen.get("decay_from")))
        elif key in PARTS:  # a choice of a group; the run's own changes nothing
            if not value.startswith(FAMILY) and not (key in NAMED and value == frozen[key].name):
                frozen[key] = composed[key]
        else:
            OmegaConf.update(frozen, key, OmegaConf.select(composed, key), merge=False, force_add=True)
    return frozen


def _checkpoint(source: str, known: str | None) -> Path:
    """Returns the checkpoint that RUN or RUN/STEP names, absolute; of RUN the one that is known already, or the
    newest.
    """
    run, step = _run_and_step(source)
    folder = (run / "checkpoints").absolute()
    if step is None and known is not None and Path(known).parent == folder:
        return Path(known)
    try:
        return folder / checkpoint_of(run, step).name
    except ValueError as error:
        raise ValueError(f"decay_from={source}: {error}") from error


def _run_and_step(source: str) -> tuple[Path, int | None]:
    """Reads RUN, RUN/STEP or RUN/checkpoints/step-STEP."""
    path = Path(home("decay_from", source))
    number = path.name.removeprefix("step-")
    if not re.fullmatch(r"\d+", number) or (path / CONFIG_FILE).is_file():
        return path, None
    return path.parent.parent if path.parent.name == "checkpoints" else path.parent, int(number)


def keep_decided(composed: DictConfig) -> None:
    """Keeps the values of DECIDED if the run in run.dir has a checkpoint, even if its length changes."""
    run = OmegaConf.select(composed, "run.dir")
    path = _config_of(str(run)) if run else None
    if path is None or not path.is_file() or not checkpoints(path.parent):
        return
    frozen = OmegaConf.create(yaml.safe_load(path.read_bytes()))
    for key in DECIDED:
        if OmegaConf.select(composed, key) is None:
            OmegaConf.update(composed, key, OmegaConf.select(frozen, key))


def _key(argument: str) -> str:
    return argument.partition("=")[0].lstrip("+~")


def _value(argument: str) -> str:
    """Returns the value without Hydra's quotes."""
    return argument.partition("=")[2].strip("'\"")


def _names_folder(override: str) -> bool:
    return _key(override) == "run.dir"


def _config_of(run: str) -> Path:
    return Path(home("resume", run)) / CONFIG_FILE


def _frozen(run: str, key: str = "resume") -> DictConfig:
    """Reads and checks the settings of a run. key: the setting that names it."""
    path = _config_of(run)
    if not path.is_file():
        raise ValueError(f"{key}={run} must be the folder of a run: {path} is missing{nearest(path.parent, '; ')}")
    load_config(path)
    frozen = with_new_names(OmegaConf.create(yaml.safe_load(path.read_bytes())))
    frozen.optim.setdefault("name", OptimConfig.name)  # older runs have no name there
    return frozen
