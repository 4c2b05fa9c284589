"""record.json, which a job writes last: its schema, and how it is read.

Writer, lineage, table, report and MLflow all use the types below. They describe plain JSON objects, so that a
record's hash is the same after reading as it was when written.

Damaged files are treated alike everywhere. A run that the user names must be readable: `read_record` raises
CheckpointError with one line. Where many runs are listed, `stored_runs` skips the damaged ones and prints one
line that names them.
"""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypeVar, cast

from pydantic import ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from r1pipe.config.schema import ParentRef
from r1pipe.core.errors import CheckpointError
from r1pipe.core.paths import RunFolder
from r1pipe.runs.jsonfile import read_object

OWN_HASH: Literal["record_hash"] = "record_hash"  # of all the rest of the record
STRICT = ConfigDict(strict=True, extra="allow")  # "3" is no number; other versions may have other keys
T = TypeVar("T")


@with_config(STRICT)
class Metrics(TypedDict, total=False):
    """An evaluation: evaluation.json, and `metrics` in record.json. Shares are in 0..1; None: not known."""

    pass_at_1: float | None
    pass_at_1_ci: Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)] | None  # 95% interval
    greedy: float | None
    cons_at_k: float | None
    k: int | None
    problems: int | None
    samples: int | None
    unscored: int | None  # samples whose verifier or sandbox failed
    too_long: int | None  # prompts that leave no room for an answer
    format_rate: float | None
    language_consistency: float | None
    length_mean: float | None  # tokens
    truncation_rate: float | None
    general_score: float | None
    preference_score: float | None
    refusal_rate: float | None
    safe_answer_rate: float | None
    by_task: dict[str, "Metrics"] | None
    by_language: dict[str, "Metrics"] | None
    general_by_kind: dict[str, float | None] | None
    strategies: dict[str, float | None] | None
    reward_models: dict[str, dict[str, float | None]] | None  # kind -> what was measured of the model
    weak_judges: int | None  # how many of them were used all the same
    forced_judges: list[str] | None  # the weaknesses that stage.preference.force let pass


METRICS = tuple(Metrics.__annotations__)


@with_config(STRICT)
class Edge(TypedDict):
    """A parent's checkpoint, as config.schema.ParentRef has it, and the hash of the parent's own record."""

    stage: str
    run_id: str
    checkpoint: str
    hash: str
    record_hash: NotRequired[str | None]


@with_config(STRICT)
class Parents(TypedDict, total=False):
    weights: Edge | None
    data: list[Edge]


@with_config(STRICT)
class Data(TypedDict, total=False):
    name: str
    kind: str
    path: str | None
    hash: str | None
    set_aside: int  # rows that were rejected


@with_config(STRICT)
class Code(TypedDict, total=False):
    revision: str | None  # None in an installed wheel
    dirty: bool | None
    diff: str  # a file of the run folder
    diff_hash: str | None


@with_config(STRICT)
class History(TypedDict):
    """What later sessions of the run had other than the first."""

    file: str
    hash: str
    changed: list[str]


@with_config(STRICT)
class Result(TypedDict, total=False):
    """What only the job knows."""

    wall_s: FiniteFloat
    seconds: dict[str, FiniteFloat]  # by phase
    steps: int
    data_hash: str | None  # of what was trained on
    metrics: Metrics


@with_config(STRICT)
class Record(Result):
    """The content of record.json. Records of older versions lack what is NotRequired."""

    format: NotRequired[int]
    run_id: NotRequired[str]
    stage: str
    seed: NotRequired[int]
    pipeline: str
    created: str  # ISO 8601, UTC
    parents: NotRequired[Parents]
    config_hash: NotRequired[str]
    config: NotRequired[dict[str, Any]]
    data: NotRequired[Data]
    code: NotRequired[Code]
    files: NotRequired[dict[str, str]]  # path in the run folder -> SHA-256
    tokenizer_hash: NotRequired[str]
    template_hash: NotRequired[str]
    checkpoint: str  # relative to the run folder
    checkpoint_hash: str
    versions: NotRequired[dict[str, str | None]]
    history: NotRequired[History]
    record_hash: NotRequired[str]


@with_config(STRICT)
class Stage(TypedDict):
    name: str


@with_config(STRICT)
class Recipe(TypedDict, total=False):
    name: str
    stages: list[str]
    controls: list[str]


@with_config(STRICT)
class StoredConfig(TypedDict):
    """What the command line reads of a run's config.json; r1pipe.config.read_config knows all of it."""

    stage: Stage
    pipeline: NotRequired[str]
    seed: NotRequired[int]
    recipe: NotRequired[Recipe | None]
    weights_from: NotRequired[Edge | None]
    reads_from: NotRequired[dict[str, Edge] | None]


_RECORD, _CONFIG = TypeAdapter(Record), TypeAdapter(StoredConfig)


def read_record(path: Path) -> Record:
    """A record.json of this or an older version. Raises CheckpointError naming file, key and remedy."""
    return cast(Record, checked(_RECORD, read_object(path), path))


def checked(schema: TypeAdapter[Any], content: T, path: Path) -> T:
    """The content itself, not a copy: its hash must not change."""
    try:
        schema.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        problem = "is missing" if first["type"] == "missing" else f"is wrong ({first['msg']})"
        raise CheckpointError(
            f"{path}: {key} {problem}; move the run folder away and run the stage again"
        ) from None
    return content


def record_of(run: RunFolder) -> Record:
    """The record of a finished run. Raises CheckpointError where there is none that can be used."""
    if not run.record.exists():
        raise CheckpointError(
            f"run {run.run_id} has not finished; let it (`r1pipe run` goes on with it) or give a path in "
            f"{run.checkpoints}"
        )
    return read_record(run.record)


@dataclass(frozen=True)
class StoredRun:
    """A run folder with its config.json and, where it has finished, its record.json."""

    folder: RunFolder
    config: dict[str, Any]
    record: Record | None

    @classmethod
    def read(cls, folder: RunFolder) -> "StoredRun":
        """Raises CheckpointError where one of the two is damaged, or config.json is missing."""
        config = checked(_CONFIG, read_object(folder.config), folder.config)
        return cls(folder, config, read_record(folder.record) if folder.record.exists() else None)

    @property
    def stage(self) -> str:
        return self.config["stage"]["name"]

    @property
    def recipe(self) -> Recipe:
        return cast(Recipe, self.config.get("recipe") or {})

    @property
    def is_control(self) -> bool:
        return self.stage in self.recipe.get("controls", [])


def stored_runs(root: Path, pattern: str = "*") -> list[StoredRun]:
    """Every run under the root, by name; damaged ones are skipped, and one line on stderr names them."""
    runs: list[StoredRun] = []
    damaged: list[tuple[str, CheckpointError]] = []
    for path in sorted(root.glob(f"{pattern}/config.json")):
        try:
            if stage_name(read_object(path)) is not None:  # an exported checkpoint has a config.json, too
                runs.append(StoredRun.read(RunFolder(path.parent)))
        except CheckpointError as error:
            damaged.append((path.parent.name, error))
    if damaged:
        names = ", ".join(name for name, _ in damaged)
        warn_once(f"warning: skipped {len(damaged)} damaged run(s) ({names}): {damaged[0][1]}")
    return runs


@cache
def warn_once(line: str) -> None:
    """One command may list the runs several times."""
    print(line, file=sys.stderr, flush=True)


def stage_name(config: Mapping[str, Any]) -> str | None:
    """The stage that a config.json is for; None where it describes a model, as that of a checkpoint does."""
    stage = config.get("stage")
    name = stage.get("name") if isinstance(stage, dict) else None
    return name if isinstance(name, str) else None


def finished(runs: Iterable[StoredRun]) -> Iterator[tuple[StoredRun, Record]]:
    """The runs that have a record, oldest first."""
    done = [(run, run.record) for run in runs if run.record is not None]
    yield from sorted(done, key=lambda pair: (pair[1]["created"], pair[0].folder.run_id))


# --- parents


def edges(parents: Parents) -> list[tuple[str, ParentRef, str | None]]:
    """(kind, parent, hash of the parent's own record where it is known), weights first."""
    weights = parents.get("weights")
    named = [("weights", weights)] if weights else []
    named += [("data", edge) for edge in parents.get("data", [])]
    return [
        (kind, ParentRef(edge["stage"], edge["run_id"], edge["checkpoint"], edge["hash"]), edge.get(OWN_HASH))
        for kind, edge in named
    ]


def launched_with(config: Mapping[str, Any], path: Path) -> list[tuple[str, ParentRef, str | None]]:
    """The edges in a run's config.json. Raises CheckpointError."""
    checked(_CONFIG, config, path)
    reads = config.get("reads_from") or {}
    return edges({"weights": config.get("weights_from"), "data": list(reads.values())})


# --- hashes


def own_hash(record: Mapping[str, Any]) -> str:
    """SHA-256 over the record but for this hash itself. It finds damage and edits; a forger can make it anew,
    but not in the records of later stages, which name it."""
    rest = {key: value for key, value in record.items() if key != OWN_HASH}
    return hashlib.sha256(
        json.dumps(rest, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
    ).hexdigest()


def record_beside(checkpoint: Path) -> Path:
    """Where the record of a checkpoint's run is: in its run folder, or (data/base) beside the weights."""
    in_run = RunFolder(checkpoint.parent.parent).record
    return in_run if checkpoint.parent.name == "checkpoints" else checkpoint / in_run.name
