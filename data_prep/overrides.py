"""Quotes `key=value` for Hydra, whose grammar gives `=`, `,`, `~`, `#` and `é` other meanings than the user's.

command.py runs a command; this module only reads the text of settings.
"""

import os
import re
import shlex
from collections.abc import Iterable, Iterator
from copy import deepcopy
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf, StringNode

from data_prep.renamed import RENAMED

WITHOUT_DEFAULT = ("cluster", "recipe")  # groups that Hydra wants with a plus
TEXT, TEXTS, NAMED_TEXTS, OTHER = "text", "texts", "named texts", "other"
UNTYPED = dict.fromkeys(("init_from", "decay_from", "resume", "plot"), TEXT)  # in conf/*.yaml without a dataclass
PATHS = {"path", "paths", "dir", "out", "verify", "stats", "plot", "exclude", "resume", "init_from", "corpora"}
PATHS |= {"mounts", "container", "decay_from"}  # keys whose texts are paths
FOLDERS = {"run", "hf", "in", "out", "tied", "untied", "tokenizer"}  # the same, for commands without Hydra
SETTING = re.compile(r"(\+{0,2}[^=~@+\s-][^=]*)=(.*)", re.DOTALL)
QUOTED = re.compile(r"""'.*'|".*\"""", re.DOTALL)


def settings_known() -> dict[str, str]:
    """Maps the full name of each setting in Hydra's store to the kind of its value: TEXT, TEXTS, … or OTHER."""
    found = dict(UNTYPED)
    for name, below in ConfigStore.instance().repo.items():
        if name == "hydra" or name.startswith("_"):
            continue
        if isinstance(below, dict):
            found[name] = TEXT  # the choice of an option
            for node in schemas_below(below):
                found |= _kinds(f"{name}.", node)
        else:
            found |= _kinds("", below.node) | found  # a group stays a choice
    return found


def schemas_below(options: dict[str, Any]) -> Iterator[Any]:
    """Yields the schemas of a group in the store, and of the groups inside it."""
    for option in options.values():
        if isinstance(option, dict):
            yield from schemas_below(option)
        else:
            yield option.node


def _kinds(prefix: str, node: DictConfig) -> dict[str, str]:
    found: dict[str, str] = {}
    for key in [] if node._is_missing() or node._is_none() else node:
        child, name = node._get_node(key), f"{prefix}{key}"
        if isinstance(child, DictConfig):
            found[name] = NAMED_TEXTS if child._metadata.element_type is str else OTHER
            found |= _kinds(f"{name}.", child)
        elif isinstance(child, ListConfig):
            found[name] = TEXTS if child._metadata.element_type is str else OTHER
        else:
            found[name] = TEXT if isinstance(child, StringNode) else OTHER
    return found


def readable(arguments: Iterable[str], sweeps: bool) -> list[str]:
    """Quotes the arguments so that Hydra reads each text as it stands. sweeps: commas separate the jobs of a sweep."""
    known = settings_known()
    return [_readable(argument, known, sweeps) for argument in arguments]


def _readable(argument: str, known: dict[str, str], sweeps: bool) -> str:
    found = SETTING.fullmatch(argument)
    if found is None:
        return argument
    signed, value = found.groups()
    key = signed.lstrip("+")
    parsed = _parsed(argument)
    if key.startswith("hydra"):
        return argument
    plus = "+" if signed in WITHOUT_DEFAULT else ""
    if parsed is not None and sweeps and parsed.is_sweep_override():
        return f"{plus}{argument}"
    signed = f"{plus}{signed}"
    kind = TEXT if known.get(key.rpartition(".")[0]) == NAMED_TEXTS else known.get(key, OTHER)
    if kind == TEXTS:
        return f"{signed}={_list(value)}"
    as_it_stands = kind == TEXT and not (parsed is not None and (QUOTED.fullmatch(value) or "\\" in value))
    if parsed is None or (as_it_stands and value != "null"):
        value = quoted(value)
    return f"{signed}={value}"


def with_new_names(settings: DictConfig) -> DictConfig:
    """A copy of a file's settings with current names of keys. If a key has both names, the new one counts."""
    settings = deepcopy(settings)
    for old, new in RENAMED.items():
        group, key = old.split(".")
        given = settings.get(group)
        if isinstance(given, DictConfig) and key in given:
            OmegaConf.set_struct(given, False)
            given.setdefault(new.split(".")[1], given[key])
            del given[key]
    return settings


def _parsed(argument: str) -> Any:
    """Parses the argument as Hydra does; None if Hydra cannot."""
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None


def _list(value: str) -> str:
    """A list in Hydra's grammar, from a list in brackets, texts separated by commas, or one path."""
    if value == "null" or (value.startswith("[") and "]" not in value):
        return value
    if os.path.exists(value):
        return f"[{quoted(value)}]"
    return f"[{','.join(item if QUOTED.fullmatch(item) else quoted(item) for item in items_of(value))}]"


def items_of(value: str) -> list[str]:
    """The items of `[a,b]` or `a,b`. A comma inside quotes or inside the brackets of a glob does not separate."""
    inner = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    items, depth, quote = [""], 0, ""
    for letter in inner:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"" and not items[-1].strip():
            quote = letter
        depth += (letter in "[{") - (letter in "]}") if not quote else 0
        if letter == "," and not quote and depth <= 0:
            items.append("")
        else:
            items[-1] += letter
    return [item.strip() for item in items if item.strip()]


def quoted(value: str) -> str:
    """Puts a text in Hydra's quotes, in which only ${…} has a meaning."""
    escaped = re.sub(r"(\\*)'", lambda found: found[1] * 2 + r"\'", value)
    at_end = len(escaped) - len(escaped.rstrip("\\"))
    return f"'{escaped}{escaped[len(escaped) - at_end :]}'"


def expand_home(composed: DictConfig | ListConfig) -> None:
    """Expands each `~` at the start of a path, also in lists. Raises ValueError if the user does not exist."""
    _expand(composed, OmegaConf.to_container(composed, resolve=False), "")


def _expand(node: Any, raw: Any, path: str) -> None:
    for key, value in raw.items() if isinstance(raw, dict) else enumerate(raw):
        name = path if isinstance(key, int) else f"{path}.{key}".lstrip(".")
        if isinstance(value, dict | list):
            _expand(node[key], value, name)
        elif isinstance(value, str) and "~" in value[:4] and PATHS & set(name.split(".")[-2:]):
            node[key] = home(name, value)


def home(key: str, path: str) -> str:
    """The path with `~` and `~user` expanded, also after hf:."""
    scheme = "hf:" if path.startswith("hf:~") else ""
    bare = path.removeprefix(scheme)
    full = os.path.expanduser(bare)
    if full.startswith("~") and not os.path.exists(full):
        raise ValueError(f"{key}={path}: there is no user {full[1:].partition('/')[0]}; for a name with ~ write ./~")
    return scheme + full


def shown(*words: str) -> str:
    """Quotes words as a command line that a shell splits back into them."""
    settings = [SETTING.fullmatch(word) for word in words]
    return " ".join(
        f"{found[1]}={shlex.quote(found[2])}" if found else shlex.quote(word)
        for word, found in zip(words, settings, strict=True)
    )


def in_full(argument: str) -> str:
    """Expands `~` in `key=value` if the value is a path or a list of paths, for commands without Hydra."""
    key, equals, value = argument.partition("=")
    if key not in FOLDERS or not equals:
        return argument
    return key + equals + re.sub(r"(?:(?<=[,\[])|^)~[^,\]]*", lambda found: home(key, found[0]), value)
