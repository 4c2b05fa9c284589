"""Config, record and evaluation under the names that MLflow shows, the same in every stage."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from r1pipe.config.groups import flat
from r1pipe.runs.record import Edge, Record, code_version
from r1pipe.runs.results import COLUMNS

PARAM_LENGTH = 6000  # MLflow's limit on a parameter's value
TRIPWIRE = "tripwire."  # prefix of a run's tags for tripwires
PIPELINE, STAGE = "pipeline", "stage"  # values of the tag r1pipe.kind
SERIES = (  # of the pipeline's run, whose charts these are to be; all others come below
    *("pass_at_1", "level_4", "length_mean", "reflection_rate", "format_rate", "general_score"),
)
HASHES = ("config_hash", "data_hash", "tokenizer_hash", "template_hash", "checkpoint_hash")


def flatten(config: dict) -> dict[str, str]:
    """`{"stage": {"optim": {"lr": 0.1}}}` -> `{"stage.optim.lr": "0.1"}`; lists as JSON, cut to size."""
    texts = {key: value if isinstance(value, str) else _json(value) for key, value in flat(config)}
    return {
        key: text if len(text) <= PARAM_LENGTH else text[: PARAM_LENGTH - 1] + "…"
        for key, text in texts.items()
    }


def description(root: Path, rows: Iterable[dict], story: Sequence[str] = ()) -> str:
    """A pipeline in Markdown: its story, the table of its finished stages, and commands that show more."""
    lines = [f"| stage | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for row in rows:
        name = " ".join([row["stage"], *(f"{key}={value}" for key, value in row.get("settings", {}).items())])
        lines.append(f"| {name} | {' | '.join(value(row) for value in COLUMNS.values())} |")
    commands = ("compare", "report", "lineage CHECKPOINT")
    more = ", ".join(f"`r1pipe {command} root={root}`" for command in commands)
    told = [*(f"- {sentence[0].upper()}{sentence[1:]}" for sentence in story), ""] if story else []
    return "\n".join([*told, *lines, "", f"Run folders: `{root}`; {more}"])


def points(line: dict) -> Iterator[tuple[str, float]]:
    """The numbers of one line of metrics.jsonl.

    Short evaluations during training become `dev/...`: `eval/...` is the final measurement of every stage,
    one value per run, which MLflow's UI then draws as bars side by side.
    """
    for name, value in line.items():
        if name not in ("step", "time") and is_number(value):
            yield re.sub("^eval/", "dev/", name), float(value)


def trips(lines: Iterable[dict]) -> dict[str, str]:
    """The lines of tripwires.jsonl as tags: `tripwire.NAME`, its newest step and the likely cause."""
    return {
        f"{TRIPWIRE}{line.get('name')}": f"step {line.get('step')}: {line.get('message')}" for line in lines
    }


def final_metrics(record: Record) -> dict[str, float]:
    """A record's evaluation as `eval/...` metrics, and `time/wall_s`, where they are numbers."""
    metrics = record.get("metrics", {})
    named: dict[str, Any] = {f"eval/{name}": value for name, value in metrics.items()}
    for parts in (metrics.get("by_task"), metrics.get("by_language")):
        named |= {f"eval/{name}/pass_at_1": part.get("pass_at_1") for name, part in (parts or {}).items()}
    named |= {f"eval/general/{kind}": score for kind, score in (metrics.get("general_by_kind") or {}).items()}
    named |= {f"eval/strategy/{name}": share for name, share in (metrics.get("strategies") or {}).items()}
    for model, measures in (metrics.get("reward_models") or {}).items():
        named |= {f"eval/{model}/{measure}": value for measure, value in measures.items()}
    for name, bound in zip(("low", "high"), metrics.get("pass_at_1_ci") or (), strict=False):
        named[f"eval/pass_at_1_{name}"] = bound
    named["time/wall_s"] = record.get("wall_s")
    return {name: float(value) for name, value in named.items() if is_number(value)}


def series(final: dict[str, float]) -> dict[str, float]:
    """A stage's final metrics as points of the pipeline's run."""
    short = {name.removeprefix("eval/"): value for name, value in final.items()}
    return {f"stages/{'' if name in SERIES else 'more/'}{name}": value for name, value in short.items()}


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def provenance(record: Record) -> dict[str, str]:
    """Where a checkpoint comes from, as tags: parents, code and hashes."""
    parents = record.get("parents", {})

    def named(edge: Edge) -> str:
        return f"{edge['stage']} {edge['run_id']} {edge['hash']}"

    weights = parents.get("weights")
    tags = {
        "parents.weights": named(weights) if weights else "",
        "parents.data": "; ".join(map(named, parents.get("data") or [])),
        "parents.teacher": named(parents["teacher"]) if parents.get("teacher") else "",
        "parents.judge": named(parents["judge"]) if parents.get("judge") else "",
        "code": code_version(record),
        **{name: str(record.get(name) or "") for name in HASHES},
    }
    return {name: value for name, value in tags.items() if value}


def datasets(config: dict, record: Record) -> list[tuple[str, str, str, str]]:
    """What a run read, as (name, digest, source as JSON, context): its data, and what it sampled from."""
    data = config["data"]
    source = {name: data[name] for name in ("kind", "path", "tasks")}
    read = [(data["name"], record.get("data_hash"), _json(source), "training and evaluation")]
    for parent in (record.get("parents") or {}).get("data") or []:
        name = f"{parent['stage']} ({parent['run_id']})"
        read.append((name, parent["hash"], _json(parent), "read from a parent"))
    return [(name, digest, text, context) for name, digest, text, context in read if digest]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
