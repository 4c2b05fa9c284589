"""The schema of record.json, which a job writes last, and how it is read.

The types describe plain JSON objects, so that a record's hash does not change by reading it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypeVar, cast

from pydantic import ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from r1pipe.config import ParentRef
from r1pipe.config.changes import Change
from r1pipe.core.errors import CheckpointError
from r1pipe.core.paths import RunFolder
from r1pipe.runs.files import append_line, read_json, read_object

NO_DIFF = hashlib.sha256(b"").hexdigest()  # `Code.diff_hash` where no file that a run depends on was changed
OWN_HASH: Literal["record_hash"] = "record_hash"  # of all the rest of the record
STRICT = ConfigDict(strict=True, extra="allow")  # other versions may have other keys; nested types inherit it
T = TypeVar("T")


class Metrics(TypedDict, total=False):
    """An evaluation: evaluation.json, and `metrics` in record.json. Shares are in 0..1; None: unknown."""

    data: str | None  # the data set
    split: str | None  # "test" or "dev"
    pass_at_1: float | None
    pass_at_1_ci: Annotated[list[FiniteFloat], Field(min_length=2, max_length=2)] | None  # 95% interval
    greedy: float | None
    cons_at_k: float | None
    k: int | None
    pass_at_k: dict[str, float | None] | None  # "1", "2", "4" ... k: unbiased
    maj_at_k: dict[str, float | None] | None  # the majority of so many samples
    f1: float | None  # of DROP
    problems: int | None
    samples: int | None
    unscored: int | None  # samples whose verifier or sandbox failed
    too_long: int | None  # prompts without room for an answer
    format_rate: float | None
    language_consistency: float | None
    length_mean: float | None  # tokens
    truncation_rate: float | None
    reflection_rate: float | None  # share of completions that find a wrong result of their own and change it
    level_4: float | None  # pass@1 on problems of level 4, which no stage after the base trains on
    pass_at_1_within: dict[str, float | None] | None  # if a completion may have so many tokens
    lengths: dict[str, float | None] | None  # median, p95, max; means of right and wrong answers
    benchmark: str | None  # the file in conf/benchmark/
    protocol: dict[str, Any] | None  # how a benchmark was asked
    lm_eval: dict[str, Any] | None  # scores of a task of lm-evaluation-harness, as it names them
    contamination: dict[str, Any] | None  # its questions in what the checkpoint was trained on
    general_score: float | None
    preference_score: float | None
    refusal_rate: float | None
    identity: dict[str, Any] | None  # who it says it is (r1pipe.data.identity.score)
    safe_answer_rate: float | None
    refusals: dict[str, Any] | None  # by kind of risk, and of safe requests
    by_task: dict[str, "Metrics"] | None
    by_language: dict[str, "Metrics"] | None
    by_level: dict[str, "Metrics"] | None
    by_subject: dict[str, "Metrics"] | None
    general_by_kind: dict[str, float | None] | None
    strategies: dict[str, float | None] | None
    reward_models: dict[str, dict[str, float | None]] | None  # kind -> quality
    weak_judges: int | None  # how many were used anyway
    forced_judges: list[str] | None  # weaknesses that stage.preference.force accepted
    judged: dict[str, Any] | None  # what a judge says of general answers: ratings, win rate
    judge: dict[str, Any] | None  # of `judge=`: who it was, how often it was asked, what it cost


METRICS = tuple(Metrics.__annotations__)


class Edge(TypedDict):
    """A parent: a ParentRef and the hash of its own record."""

    stage: str
    run_id: str
    checkpoint: str
    hash: str
    record_hash: NotRequired[str | None]


class Parents(TypedDict, total=False):
    weights: Edge | None
    data: list[Edge]
    teacher: Edge  # of distillation, where it was a checkpoint
    judge: Edge  # of answers, where it was a checkpoint


class Data(TypedDict, total=False):
    name: str
    kind: str
    path: str | None
    hash: str | None
    set_aside: int  # rows that were rejected


class Code(TypedDict, total=False):
    revision: str | None  # None in an installed wheel
    dirty: bool | None
    diff: str  # a file of the run folder
    diff_hash: str | None


class History(TypedDict):
    """Keys that later sessions of the run changed, and the file with the changes."""

    file: str
    hash: str
    changed: list[str]


class CustomRewardSource(TypedDict):
    """Where a custom reward came from."""

    source: str  # a file's path; module:function of an entry point; URL
    hash: str | None  # SHA-256 of the file
    version: str | None  # distribution and version of an entry point


class TeacherFacts(TypedDict):
    """The teacher of a student, and what it took (r1pipe.chat.answerer.Identity and Spent)."""

    kind: str  # "checkpoint" or "server"
    name: str
    version: str
    licence: str  # "": unknown
    prompts: int  # of the dataset
    requests: int
    prompt_tokens: int
    completion_tokens: int
    seconds: FiniteFloat
    usd: FiniteFloat


class Result(TypedDict, total=False):
    """The part that only the job knows."""

    wall_s: FiniteFloat
    seconds: dict[str, FiniteFloat]  # by phase
    memory_gb: dict[str, FiniteFloat]  # most that a rank held, of its GPU or process: until trained; in all
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
    rewards: NotRequired[dict[str, CustomRewardSource]]  # custom rewards, by name
    history: NotRequired[History]
    teacher: NotRequired[TeacherFacts]
    record_hash: NotRequired[str]


_RECORD = TypeAdapter(Record)


def read_record(path: Path) -> Record:
    """A record.json of this or an older version. Raises CheckpointError naming file, key and remedy."""
    return cast(Record, checked(_RECORD, read_object(path), path))


def checked(schema: TypeAdapter[Any], content: T, path: Path) -> T:
    """The content itself, not a copy: its hash must not change. Raises CheckpointError naming the key."""
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
    """The record of a finished run. Raises CheckpointError."""
    if not run.record.exists():
        raise CheckpointError(
            f"run {run.run_id} has not finished; `r1pipe run` resumes it; or give a path in {run.checkpoints}"
        )
    return read_record(run.record)


def note(run: RunFolder, changed: Sequence[Change]) -> None:
    """Append what changed between a run's sessions to config_history.jsonl, if anything did.

    {"time": "2026-11-25T03:56:34+00:00", "changed": {"stage.keep": [2, 5]}}; code and versions have a line of
    their own: {"code.revision": ["7adeff0…", "9c8dfaa…"], "versions.torch": ["2.12.0", "2.13.0"]}.
    """
    if changed:
        values = {change.key: [change.old, change.new] for change in changed}
        now = datetime.now(UTC).isoformat(timespec="seconds")
        append_line(run.config_history, {"time": now, "changed": values})


def set_aside(run: RunFolder) -> None:
    """Make a finished run unfinished, to be extended; it keeps its earlier record."""
    if run.record.exists():
        run.record.rename(run.earlier_record(steps_of(run)))


def steps_of(run: RunFolder) -> int:
    """Optimizer steps of a finished run; 0 if its record has none."""
    steps = read_json(run.record).get("steps")
    return steps if isinstance(steps, int) else 0


def code_version(record: Mapping[str, Any], digits: int | None = None) -> str:
    """The git revision (its first `digits`) and whether files differed from it; "" if unknown."""
    code: Mapping[str, Any] = record.get("code") or {}
    revision = code.get("revision")
    if not revision:
        return ""
    if not code.get("dirty"):
        return revision[:digits]
    where = " outside the code" if code.get("diff_hash") == NO_DIFF else ""
    return f"{revision[:digits]} with changes{where}"


def edges(parents: Parents) -> list[tuple[str, ParentRef, str | None]]:
    """(kind, parent, hash of the parent's own record if known): weights, data, teacher, judge."""
    weights, teacher, judge = parents.get("weights"), parents.get("teacher"), parents.get("judge")
    named = [("weights", weights)] if weights else []
    named += [("data", edge) for edge in parents.get("data", [])]
    named += [("teacher", teacher)] if teacher else []
    named += [("judge", judge)] if judge else []
    return [
        (kind, ParentRef(edge["stage"], edge["run_id"], edge["checkpoint"], edge["hash"]), edge.get(OWN_HASH))
        for kind, edge in named
    ]


def own_hash(record: Mapping[str, Any]) -> str:
    """SHA-256 over the rest of the record: later records name it, so that edits show."""
    rest = {key: value for key, value in record.items() if key != OWN_HASH}
    text = json.dumps(rest, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def record_beside(checkpoint: Path, record_hash: str | None = None) -> Path:
    """Path of the record of a checkpoint's run: in its run folder, or (data/base) beside the weights.

    An extended run has several: this is the one with `record_hash`, or else the one that was written at this
    checkpoint. Raises CheckpointError for a damaged one.
    """
    run = RunFolder(checkpoint.parent.parent)
    if checkpoint.parent.name != run.checkpoints.name:
        return checkpoint / run.record.name
    for path in sorted(run.path.glob("record-step-*.json")):
        own = read_object(path).get(OWN_HASH)
        if own == record_hash if record_hash else path.stem == f"record-{checkpoint.name}":
            return path
    return run.record
