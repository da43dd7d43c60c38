"""Tests settings from key=value arguments."""

from dataclasses import dataclass, field

import pytest

from data_prep.arguments import defaults, settings_of


@dataclass
class Asked:
    text: str = ""
    window: str | None = None
    count: int = 3
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
    assert defaults(Asked).splitlines()[1:] == [
        *("  window=null", "  count=3", "  step=null", "  top_p=0.5", "  points=block")
    ]


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
