"""Texts of `--help`: each setting with its value and the comment beside it. command.py runs commands; this reads."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from data_prep.describe import columns, describe, shown, type_name
from data_prep.mistakes import CONF, unknown


class Line(NamedTuple):
    """One setting, as --help shows it. note: its type, and where the value comes from if a run is resumed."""

    setting: str
    note: str
    text: str


@dataclass(frozen=True)
class Help:
    """The settings of a command. name: their file in conf/. typed: keys of the command line.

    frozen: of the run to resume, changed by the command line; they are used instead of those in `config`. source: the
    file that has them.
    """

    config: DictConfig
    name: str
    typed: set[str]
    frozen: DictConfig
    source: str

    def on(self, keys: list[str]) -> str:
        """Value, type and text of each key; of a group, those of all its keys. Raises ValueError if one is unknown."""
        lines = (line for key in keys for line in self._lines(key))
        return "\n".join(f"{setting}  {note}".rstrip() + f"\n    {text}" for setting, note, text in lines)

    def on_all(self) -> str:
        """Value and text of every key."""
        head = f"From {self.source}, unless it does not have them or the command line does:\n\n" if self.source else ""
        lines = (line for key in map(str, self.config) if key != "hydra" for line in self._lines(key))
        return head + columns((line.setting, line.text) for line in lines)

    def _lines(self, key: str) -> Iterator[Line]:
        above, _, last = key.rpartition(".")
        parent = OmegaConf.select(self.config, above) if above else self.config
        if not isinstance(parent, DictConfig) or last not in set(parent):  # also one that must be given
            raise ValueError(unknown(key, [str(name) for name in parent] if isinstance(parent, DictConfig) else []))
        value: Any = "" if OmegaConf.is_missing(parent, last) else parent[last]
        if isinstance(value, DictConfig) and is_dataclass(OmegaConf.get_type(value)):
            for inner in map(str, value):
                yield from self._lines(f"{key}.{inner}")
            return
        kind = OmegaConf.get_type(parent)
        known = describe(kind) if is_dataclass(kind) else {}
        kept, origin = self._kept(key, value)
        notes = [type_name(known[last].type) if last in known else "", origin]
        text = known[last].text if last in known else _comment(self.name, last)
        yield Line(f"{key}={shown(kept)}", ", ".join(filter(None, notes)), text)

    def _kept(self, key: str, value: Any) -> tuple[Any, str]:
        """The value that will be used, and its origin; "" if no run is resumed."""
        if not self.source:
            return value, ""
        above, _, last = key.rpartition(".")
        parent = OmegaConf.select(self.frozen, above) if above else self.frozen
        if isinstance(parent, DictConfig) and last in parent:
            value, origin = parent[last], f"from {self.source}"
        else:
            origin = "default"
        return value, "from the command line" if key in self.typed else origin


def _comment(name: str, key: str) -> str:
    """The comment beside a key at the top of conf/NAME.yaml, or of conf/train.yaml."""
    texts = ((CONF / f"{name}.yaml").read_text() for name in (name, "train"))
    found = (re.search(rf"^{re.escape(key)}: .*?  # (.+)$", text, re.MULTILINE) for text in texts)
    return next((match[1] for match in found if match), "")
