"""Tests settings from key=value arguments."""

from dataclasses import dataclass, field

import pytest

from data_prep.arguments import defaults, settings_of
from data_prep.describe import columns


@dataclass
class Asked:
    text: str = ""
    window: str | None = None
    count: int = 3  # how many
    step: int | None = None
    top_p: float = 0.5
    points: list[str] = field(default_factory=lambda: ["block"])


@pytest.mark.parametrize(
    "text", ["echo ${HOME}", "${", "???", "a=b", "null", "[1, 2]", "\n 1e3 ", "", "${oc.env:HOME}"]
)
def test_text_reaches_settings_unchanged(text):
    assert settings_of(Asked, [f"text={text}"]) == Asked(text=text)


def test_numbers_lists_and_null_are_parsed():
    given = settings_of(Asked, ["window=1:2", "count=7", "step=null", "top_p=1e-1", "points=[attention, mlp]"])
    assert given == Asked(window="1:2", count=7, step=None, top_p=0.1, points=["attention", "mlp"])
    assert settings_of(Asked, ["window=null"]).window is None


def test_defaults_stand_beside_their_texts():
    assert defaults(Asked).splitlines() == [
        *("  text=", "  window=null", "  count=3       how many", "  step=null", "  top_p=0.5", "  points=block")
    ]


def test_a_long_text_is_wrapped_beside_its_setting():
    text = "word " * 20
    first, second, long, below = columns([("key=1", text.strip()), ("k" * 60 + "=2", "below")]).splitlines()
    assert first.startswith("  key=1  ") and max(map(len, (first, second))) <= 120
    assert first.index("word") == second.index("word") and first.count("word") + second.count("word") == 20
    assert long == "  " + "k" * 60 + "=2" and below.strip() == "below" and below.index("below") == first.index("word")


@pytest.mark.parametrize(
    "argument,message",
    [
        ("count=1.5", "count=1.5 must be a whole number"),
        ("count=null", "count=null must be a whole number"),
        ("step=abc", "step=abc must be a whole number or null"),
        ("top_p=high", "top_p=high must be a number"),
        ("size=3", "unknown key size; there are text, window, count, step, top_p, points"),
        ("text", "'text' must be key=value; see --help"),
    ],
)
def test_wrong_arguments_name_their_key(argument, message):
    with pytest.raises(ValueError) as error:
        settings_of(Asked, [argument])
    assert str(error.value) == message
