"""The options of the scripts of stages/ that run without DeepSpeed, handed over as one JSON file.

The command line fills a dataclass and calls `write`; the script calls `read`. No torch here.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Gt, Le, Lt

from r1pipe.core.errors import ConfigError

Precision = Literal["float32", "bfloat16", "fp8"]  # the keys of model.weights.PRECISIONS, which needs torch
Reward = Literal["accuracy", "code", "format", "language"]
Language = Literal["en", "zh"]
Gigabytes = Annotated[float, Gt(0), Lt(math.inf)]


@dataclass(frozen=True)
class ScriptOptions:
    """What all have: no key that is not theirs, no conversion of types."""

    __pydantic_config__ = {"extra": "forbid", "strict": True}  # noqa: RUF012 - pydantic asks for a plain dict


@dataclass(frozen=True)
class GenerateOptions(ScriptOptions):
    """What stages/generate.py does; None for temperature and top_p: the checkpoint's own setting."""

    checkpoint: Path
    questions: list[str]  # empty: one per line of standard input
    chat: bool  # ask and answer until the input ends
    as_json: bool  # one JSON object per answer
    temperature: Annotated[float, Ge(0), Lt(math.inf)] | None  # 0: greedy
    top_p: Annotated[float, Gt(0), Le(1)] | None
    max_tokens: Annotated[int, Ge(1)] | None  # longest answer; None: what the context leaves
    seed: Annotated[int, Ge(0), Lt(2**64)]


@dataclass(frozen=True)
class ScoreOptions(ScriptOptions):
    """What stages/score.py does."""

    file: Path  # JSONL, a completion a line
    reward: Reward
    language: Language  # of the questions


@dataclass(frozen=True)
class ExportOptions(ScriptOptions):
    """What stages/export.py does."""

    checkpoint: Path
    folder: Path  # made; must not hold anything yet
    dtype: Precision | None  # None: every tensor as it is
    shard_gb: Gigabytes  # largest file, and about as much memory


@dataclass(frozen=True)
class ImportOptions(ScriptOptions):
    """What stages/import_weights.py does."""

    folder: Path  # the published checkpoint
    target: Path  # the checkpoint to make
    dtype: Precision | None  # None: every tensor as it is
    shard_gb: Gigabytes  # largest file, and about as much memory


Options = TypeVar("Options", bound=ScriptOptions)


def write(options: ScriptOptions, path: Path) -> None:
    """Raises ConfigError for a value that the script would refuse, before that script loads torch."""
    text = json.dumps(asdict(options), default=str)
    _parse(type(options), text)
    path.write_text(text, encoding="utf-8")


def read(kind: type[Options], argv: list[str]) -> Options:
    """The options in the file that is a script's one argument. Raises ConfigError."""
    if len(argv) != 2:
        raise ConfigError(f"{Path(argv[0]).name} takes one argument: a JSON file with {kind.__name__}")
    try:
        return _parse(kind, Path(argv[1]).read_bytes())
    except OSError as error:
        raise ConfigError(f"{argv[1]} cannot be read ({error.strerror})") from None


def _parse(kind: type[Options], text: str | bytes) -> Options:
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        first: Any = error.errors()[0]
        problem = first["msg"].replace("Input should", "must")
        if not first["loc"]:  # no JSON at all
            raise ConfigError(f"the options of a script: {problem}") from None
        option = str(first["loc"][0]).replace("_", "-")
        raise ConfigError(f"--{option} {first['input']}: {problem}") from None
