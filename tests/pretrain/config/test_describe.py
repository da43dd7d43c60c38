"""Settings of a run have a text beside each field."""

from dataclasses import MISSING, dataclass, field

import pytest

from pretrain.config.checkpoint import CheckpointConfig
from pretrain.config.data import DataConfig
from pretrain.config.describe import Setting, describe
from pretrain.config.engine import ENGINES
from pretrain.config.evaluation import EvalConfig
from pretrain.config.job import JobConfig, RunConfig
from pretrain.config.monitor import LogConfig, MonitorConfig
from pretrain.config.optim import OptimConfig, OwnerConfig
from pretrain.config.training import TrainingConfig
from pretrain.config.vocab import VocabConfig
from pretrain.families import FAMILIES

GROUPS = [
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    MonitorConfig,
    OptimConfig,
    OwnerConfig,
    TrainingConfig,
    VocabConfig,
]
MODELS = [family.config for family in FAMILIES.values()]


@dataclass
class Example:
    """A class, with # a comment that belongs to no field."""

    required: int  # must be given
    #: seconds to wait,
    #: in two lines
    delay: float = 1.5
    names: list[str] = field(default_factory=list)  # empty: none
    bare: str = "# no comment"

    def method(self) -> None:
        local = 1  # not a field
        del local


def test_describe_returns_type_default_and_text():
    assert describe(Example) == {
        "required": Setting(int, MISSING, "must be given"),
        "delay": Setting(float, 1.5, "seconds to wait, in two lines"),
        "names": Setting(list[str], [], "empty: none"),
        "bare": Setting(str, "# no comment", ""),
    }


@pytest.mark.parametrize("kind", [JobConfig, RunConfig, *GROUPS, *ENGINES.values(), *MODELS])
def test_every_setting_has_a_text(kind):
    settings = describe(kind)
    assert settings and [key for key, setting in settings.items() if not setting.text] == []
