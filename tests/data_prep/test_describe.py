"""The texts beside the fields of a dataclass."""

from dataclasses import MISSING, dataclass, field

from data_prep.describe import Setting, describe


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


@dataclass
class Derived(Example):
    delay: float = 2.0  # another text
    own: int | None = None  # its own


def test_describe_includes_the_fields_of_base_classes():
    settings = describe(Derived)
    assert settings["required"].text == "must be given" and settings["delay"] == Setting(float, 2.0, "another text")
    assert settings["own"] == Setting(int | None, None, "its own")
