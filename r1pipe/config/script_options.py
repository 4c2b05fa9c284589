"""The options of the scripts of stages/ that run without DeepSpeed, handed over as one JSON file.

The command line fills a dataclass and calls `write`; the script calls `read`. No torch here.
"""

import json
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from r1pipe.config.data import DataConfig
from r1pipe.config.fields import AboveZero, Count, NonNegative, Positive, Strict, build
from r1pipe.config.screening import ScreeningConfig
from r1pipe.config.serving import ServeConfig
from r1pipe.core.errors import ConfigError

SHOWN = 20  # characters on either side of one that is not UTF-8
Precision = Literal["float32", "bfloat16", "fp8"]  # the keys of model.weights.PRECISIONS, which needs torch


@dataclass(frozen=True)
class GenerateOptions(Strict):
    """What stages/generate.py does; None for temperature and top_p: the checkpoint's own setting."""

    checkpoint: Path
    questions: list[str]  # empty: one per line of standard input
    chat: bool  # ask and answer until the input ends
    as_json: bool  # one JSON object per answer
    temperature: NonNegative | None  # 0: greedy
    top_p: Annotated[float, Field(gt=0, le=1)] | None
    max_tokens: Positive | None  # longest answer; None: what the context leaves
    seed: Annotated[Count, Field(le=2**64 - 1)]
    system: str | None = None  # system prompt; "": none; None: the checkpoint's own


@dataclass(frozen=True)
class ServeOptions(Strict):
    """What stages/serve.py does."""

    checkpoint: Path
    name: str  # what clients call the model
    settings: ServeConfig
    system: str | None = None  # system prompt; "": none; None: the checkpoint's own


@dataclass(frozen=True)
class ScoreOptions(Strict):
    """What stages/score.py does."""

    file: Path  # JSONL, a completion a line
    reward: str  # accuracy, code, format, language, or a custom reward
    language: str  # of the questions; auto: as each is written
    strict: bool = False  # end at the first row that cannot be scored
    plugins: list[str] = field(default_factory=list)  # Python files with custom rewards
    # of programs; None: the values of conf/stage/part/common.yaml
    cpu_seconds: AboveZero | None = None
    memory_mb: Positive | None = None
    partial_credit: bool | None = None


@dataclass(frozen=True)
class DataOptions(Strict):
    """What stages/data.py does."""

    data: DataConfig
    checkpoint: Path | None  # whose tokenizer and template are used; None: those of the bundled base
    as_json: bool
    system: str | None = None  # chat.system
    screening: ScreeningConfig | None = None  # None: rows are not looked over


@dataclass(frozen=True)
class ExportOptions(Strict):
    """What stages/export.py does."""

    checkpoint: Path
    folder: Path  # made; must not hold anything yet
    dtype: Precision | None  # None: every tensor as it is
    shard_gb: AboveZero  # largest file, and about as much memory


@dataclass(frozen=True)
class ImportOptions(Strict):
    """What stages/import_weights.py does."""

    folder: Path  # the published checkpoint
    target: Path  # the checkpoint to make
    dtype: Precision | None  # None: every tensor as it is
    shard_gb: AboveZero  # largest file, and about as much memory


Options = TypeVar("Options")


def write(options: Any, path: Path) -> None:
    """Raises ConfigError for a value that the script would refuse, before that script loads torch."""
    text = json.dumps(asdict(options), default=str, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        around = text[max(0, error.start - SHOWN) : error.end + SHOWN]
        raise ConfigError(f"{around!r} is not valid UTF-8; convert it, or rename the file") from None
    _checked(type(options), json.loads(text))
    path.write_text(text, encoding="utf-8")


def read(kind: type[Options], argv: list[str]) -> Options:
    """The options in the file that is a script's one argument. Raises ConfigError."""
    if len(argv) != 2:
        raise ConfigError(f"{Path(argv[0]).name} takes one argument: a JSON file with {kind.__name__}")
    try:
        return _checked(kind, json.loads(Path(argv[1]).read_bytes()))
    except OSError as error:
        raise ConfigError(f"{argv[1]} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ConfigError(f"{argv[1]} is not JSON: {error}") from None


def _checked(kind: type[Options], mapping: Any) -> Options:
    """Names a wrong value as the option it comes from."""
    try:
        return build(kind, mapping)
    except ConfigError as error:
        message = re.sub(r"^\w+", lambda name: name[0].replace("_", "-"), str(error))
        raise ConfigError(f"--{message}") from None
