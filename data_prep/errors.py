"""The exception for wrong input or settings, as opposed to bugs of the program."""


class DataError(ValueError):
    """A mistake that the user can fix. The message is one line: what is wrong, where, and the rule that it breaks."""


def headline(error: BaseException) -> str:
    """The first line of another library's exception, or its type if it has no message."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
