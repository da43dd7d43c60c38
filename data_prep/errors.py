"""The one exception that means: the input or the settings are wrong, not the program."""


class DataError(ValueError):
    """A mistake that the user can mend. Its message is one line: what, where, and the rule that it breaks."""


def headline(error: BaseException) -> str:
    """The first line of another library's exception, or its type where it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
