"""Runs commands: a wrong command line is one line on stderr and exit code 2, in every command."""

import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import hydra
import yaml
from hydra._internal.hydra import Hydra
from hydra._internal.utils import get_args_parser  # the only list of Hydra's own flags
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_prep import terminal
from data_prep.errors import headline
from data_prep.help_text import Help
from data_prep.mistakes import CONF, check_bases, mistake
from data_prep.origin import origins, remember
from data_prep.overrides import expand_home, in_full, readable
from data_prep.renamed import renamed
from data_prep.terminal import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED

EXIT_ERROR = 2
HELP_FLAGS = {"-h", "--help"}
GET_MODE = Hydra.get_mode
Frozen = Callable[[DictConfig, list[str]], tuple[DictConfig, str]]


def _none_frozen(composed: DictConfig, overrides: list[str]) -> tuple[DictConfig, str]:
    return OmegaConf.create(), ""


def run_hydra(
    function: Callable[[DictConfig], Any], config_name: str, sweeps: bool = False, frozen: Frozen = _none_frozen
) -> None:
    """Calls the function with the settings that Hydra composes from conf/CONFIG_NAME.yaml and the command line.

    Expands `~`. A mistake in the settings ends the command with one line. sweeps: --multirun is allowed, and calls
    the function once per job. frozen: returns the settings of the run to resume, and their file, for --help.
    """
    terminal.loaded()
    # Hydra copies the whole store for each group that --help lists (one second in all), besides each node it loads.
    ConfigStore.__deepcopy__ = lambda store, memo: store  # type: ignore[attr-defined]
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises its errors instead of printing them
    composing = True

    def composed(config: DictConfig) -> Any:
        nonlocal composing
        composing = False
        typed = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
        remember(HydraConfig.get().runtime.choices, typed)  # type: ignore[arg-type]
        with one_line():
            check_bases(config, HydraConfig.get().runtime.choices)
            expand_home(config)
        return function(config)

    try:
        if asked := _keys_asked_for(sys.argv[1:]):
            with one_line():
                terminal.product()
                print(_help(config_name, frozen, asked))
            return
        _add_settings_to_help(config_name, frozen)
        sys.argv[1:] = _checked(sys.argv[1:], sweeps)
        # Hydra composes all settings a first time, only to look for hydra.mode: not if nothing can have set it.
        Hydra.get_mode = _no_mode if _is_plain(sys.argv[1:]) else GET_MODE  # type: ignore[assignment, method-assign]
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(composed)()
    except (HydraException, OmegaConfBaseException) as error:  # only these: our own bugs keep their traceback
        sys.exit(fail(mistake(error)))
    except (yaml.YAMLError, ValueError) as error:
        if not composing:
            raise
        sys.exit(fail(mistake(error)))
    except KeyboardInterrupt:
        fail("interrupted")
        sys.exit(EXIT_INTERRUPTED)


def _keys_asked_for(arguments: list[str]) -> list[str]:
    """Returns the keys after --help, as in `--help optim.lr`."""
    if not HELP_FLAGS & set(arguments):
        return []
    return [word for word in _without_help(arguments).overrides if "=" not in word and word[:1] not in ("", "~")]


def _without_help(arguments: list[str]) -> Namespace:
    """Parses the other arguments: argparse takes no positional ones on both sides of a flag."""
    return get_args_parser().parse_args([word for word in arguments if word not in HELP_FLAGS])


def _help(config_name: str, frozen: Frozen, keys: list[str]) -> str:
    """Returns the help on the keys, with the settings of the command line."""
    parsed = _without_help(sys.argv[1:])
    typed = [word for word in parsed.overrides if word not in keys]
    typed = readable(_with_new_names(typed), sweeps=False)
    name = parsed.config_name or config_name
    return _help_of(_composed(name, typed), name, typed, frozen).on(keys)


def _help_of(config: DictConfig, name: str, typed: list[str], frozen: Frozen) -> Help:
    keys = {override.partition("=")[0].lstrip("+~") for override in typed}
    return Help(config, name, keys, *frozen(config, typed))


def _add_settings_to_help(config_name: str, frozen: Frozen) -> None:
    """Lets the help texts of conf/ contain `${settings:}`, the settings as chosen."""

    def settings(*, _root_: DictConfig) -> str:
        parsed = _without_help(sys.argv[1:])
        text = _help_of(_root_, parsed.config_name or config_name, parsed.overrides, frozen).on_all()
        return text.replace("$", "$$")  # Hydra substitutes its own $NAMES next

    OmegaConf.register_new_resolver("settings", settings, replace=True)


def _checked(arguments: list[str], sweeps: bool) -> list[str]:
    """Rewrites the command line so that Hydra reads it as the user meant it. Raises ValueError if it is not valid."""
    parser = get_args_parser()
    parser.error = _refuse  # type: ignore[method-assign]  # argparse's own error prints eight lines of usage
    parsed = parser.parse_args(arguments)
    if parsed.multirun and not sweeps:
        raise ValueError("--multirun is not possible here: this command writes one folder")
    for override in parsed.overrides:
        if not override.startswith("~") and "=" not in override[1:]:
            raise ValueError(f"{override!r} must be key=value; see --help")
    given = dict(zip(parsed.overrides, readable(_with_new_names(parsed.overrides), parsed.multirun), strict=True))
    return [given.get(argument, argument) for argument in arguments]


def _no_mode(hydra: Hydra, config_name: str | None, overrides: list[str]) -> None:
    """Replaces `Hydra.get_mode`: hydra.mode is not set."""


def _is_plain(arguments: list[str]) -> bool:
    """True if all arguments are settings of ours: no flags, and none of Hydra's own settings."""
    return not any(argument.startswith("-") or "hydra" in argument.partition("=")[0] for argument in arguments)


def _with_new_names(overrides: list[str]) -> list[str]:
    """Replaces old names of settings by the current ones. Warns about each."""
    known = renamed(overrides)
    for old, new in known.items():
        warn(f"{old.partition('=')[0].lstrip('+~')} is now called {new.partition('=')[0].lstrip('+~')}")
    return [known.get(override, override) for override in overrides]


def _refuse(message: str) -> NoReturn:
    raise ValueError(f"{message}; settings are key=value, see --help")


def compose_settings(config_name: str, overrides: list[str]) -> DictConfig:
    """Composes the settings as `run_hydra` does, for a command that also has settings of its own. Raises Hydra's
    errors.
    """
    return _composed(config_name, readable(_with_new_names(overrides), sweeps=False))


def _composed(config_name: str, overrides: list[str]) -> DictConfig:
    with hydra.initialize_config_dir(str(CONF), version_base=None):
        config = hydra.compose(config_name, overrides)
    expand_home(config)
    return config


def arguments_or(help_text: str) -> list[str]:
    """The arguments of the command line. If there are none, or one is --help, prints the text and exits 0."""
    arguments = [in_full(argument) for argument in sys.argv[1:]]
    if not arguments or {"-h", "--help"} & set(arguments):
        terminal.product()
        print(help_text.rstrip())
        sys.exit(0)
    return arguments


@contextmanager
def one_line(*mistakes: type[Exception], remark: str = "") -> Iterator[None]:
    """Turns errors into exit codes. Hydra's errors, ValueError, OSError and the `mistakes` print one line and exit 2.

    Ctrl-C exits 130. A `terminal.product` that has lost its reader exits 141, without a line. remark: what happened to
    the files, added to the line of an OSError and of Ctrl-C.
    """
    terminal.loaded()
    try:
        yield
    except BrokenPipeError:
        sys.exit(EXIT_BROKEN_PIPE)
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(fail(mistake(error)))
    except (ValueError, OSError, *mistakes) as error:  # type: ignore[misc]
        sys.exit(fail(f"{headline(error)}{remark if isinstance(error, OSError) else origins(headline(error))}"))
    except KeyboardInterrupt:
        fail(f"interrupted{remark}")
        sys.exit(EXIT_INTERRUPTED)


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return EXIT_ERROR
