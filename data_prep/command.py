"""What every command does with a wrong command line: one line on stderr, exit code 2."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from data_prep import terminal
from data_prep.errors import headline
from data_prep.terminal import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED

EXIT_ERROR = 2


def run_hydra(composed: Callable[[], Any], sweeps: bool = False) -> None:
    """Run a function under `hydra.main`; what Hydra finds wrong is one line. sweeps: it is one for --multirun."""
    terminal.loaded()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # so that Hydra raises its errors, and does not print them
    if not sweeps and {"-m", "--multirun"} & set(sys.argv[1:]):
        sys.exit(fail("--multirun is not for this program: a command makes one folder"))
    try:
        composed()
    except (HydraException, OmegaConfBaseException) as error:  # no more: the traceback of a fault of ours is to be seen
        sys.exit(fail(override_error(error)))
    except KeyboardInterrupt:
        fail("interrupted")
        sys.exit(EXIT_INTERRUPTED)


def arguments_or(help_text: str) -> list[str]:
    """The command line's. Where there are none, or --help is among them, prints the text and exits 0."""
    arguments = sys.argv[1:]
    if not arguments or {"-h", "--help"} & set(arguments):
        terminal.product()
        print(help_text.rstrip())
        sys.exit(0)
    return arguments


@contextmanager
def one_line(*mistakes: type[Exception], remark: str = "") -> Iterator[None]:
    """Exits 2 with one line on what Hydra finds wrong, on a ValueError, an OSError, or one of the `mistakes`; 130 on
    Ctrl-C, 141 in silence if a `terminal.product` has lost its reader. remark: what became of files, told of an OSError
    and of Ctrl-C.
    """
    terminal.loaded()
    try:
        yield
    except BrokenPipeError:
        sys.exit(EXIT_BROKEN_PIPE)
    except (HydraException, OmegaConfBaseException) as error:
        sys.exit(fail(override_error(error)))
    except (ValueError, OSError, *mistakes) as error:  # type: ignore[misc]
        sys.exit(fail(f"{headline(error)}{remark if isinstance(error, OSError) else ''}"))
    except KeyboardInterrupt:
        fail(f"interrupted{remark}")
        sys.exit(EXIT_INTERRUPTED)


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return EXIT_ERROR


def override_error(error: Exception) -> str:
    """One line from Hydra's several: its own headline, that of the cause, and what would have been right."""
    message, cause = headline(error), error.__cause__
    if isinstance(error, OverrideParseException):
        message = f"cannot read {error.override}: {message}"
    append = [line for line in str(error).splitlines() if line.startswith("To append to your default list")]
    message = " ".join([message, *append])
    if cause is not None and headline(cause) not in message:
        message = f"{message.rstrip('.')}: {headline(cause)}"
    if isinstance(error, MissingConfigException) and error.options:
        message += f"; there are {', '.join(error.options)}"
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and is_dataclass(cause.object_type):
        message += f"; there are {', '.join(item.name for item in fields(cause.object_type))}"
    return message
