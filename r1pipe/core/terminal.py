"""How the command line and the scripts that it starts begin and end.

Text is UTF-8 whatever the locale is, an error that a user can cause is one line, and a reader who has left
(`| head`) is no error.
"""

import io
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from r1pipe.core.errors import R1pipeError
from r1pipe.core.redaction import without_secrets

if TYPE_CHECKING:
    from rich.console import Console


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` and exit with its code: 2 for a user's mistake, 130 for Ctrl-C, 1 if the reader has left.

    Bytes on standard input that are not UTF-8 become surrogates, which the caller must check for.
    """
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, None), (sys.stderr, None)):
        if isinstance(stream, io.TextIOWrapper):  # it may be closed, or replaced by a test
            stream.reconfigure(encoding="utf-8", errors=errors or "backslashreplace")
    try:
        code = main() or 0
        if sys.stdout:
            sys.stdout.flush()
    except R1pipeError as error:
        code = 2
        complain(str(error))
    except KeyboardInterrupt:
        code = 130
    except BrokenPipeError:
        code = 1
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
    sys.exit(code)


def console_of(width: int) -> "Console":
    """The console that tables are printed on: as wide as the terminal, or `width` without one."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=width, color_system=None)


def complain(message: str) -> None:
    """Print one line on standard error, without secrets; nothing for an empty message."""
    if message:
        print(f"r1pipe: {without_secrets(' '.join(message.split()))}", file=sys.stderr, flush=True)
