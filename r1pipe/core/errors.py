"""Errors that users can cause: one line that names the key or file and the remedy, exit code 2."""

import difflib
import errno
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path


class R1pipeError(Exception):
    """Base class: shown to the user as one line, without a traceback."""


class ConfigError(R1pipeError, ValueError):
    """An invalid key, value, type or combination in the config."""


class DataError(R1pipeError, ValueError):
    """A data file that is missing, malformed or lacks a column; names file and line."""


class CheckpointError(R1pipeError, ValueError):
    """A checkpoint that is missing, incomplete or does not fit; names file and tensor."""


class EnvironmentProblem(R1pipeError, RuntimeError):
    """The machine lacks something: compiler, package, disk space, server."""


class SamplerLost(EnvironmentProblem):
    """What draws completions is gone, or is not what it should be; raised in all ranks together, which can
    then save what they have. `again`: it had its weights, so the step may be taken again."""

    def __init__(self, problem: str, again: bool = False):
        super().__init__(problem)
        self.again = again


class NumericProblem(R1pipeError, ArithmeticError):
    """A loss, gradient or probability that is NaN or infinite; names the layer where it arose."""


class Tripped(R1pipeError, RuntimeError):
    """A tripwire has paused or stopped a run; names the wire, the likely cause and how to continue."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The remedy for an unknown name: the most similar known name, or all of them."""
    names = sorted(known)
    similar = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"did you mean {similar[0]}?" if similar else f"known: {', '.join(names)}"


def disk_is_full(error: BaseException) -> bool:
    """Whether the disk was full, also when a library wrapped the error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(cause):  # safetensors keeps only the text
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def no_room(what: str, folder: Path) -> str:
    """The message for a full disk."""
    return (
        f"the disk of {folder} is full: {what}; free some space there, then run the same command again: it "
        "resumes from the last checkpoint"
    )


def record_error(path: Path, line: str) -> None:
    """Write the user's error to a file. If several processes fail together, the first one's is kept."""
    with suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
        file.write(f"{line}\n")
