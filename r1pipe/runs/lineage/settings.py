"""A checkpoint's shape and its run's data, seed and pipeline, as overrides: what `r1pipe eval` goes by."""

import json
from pathlib import Path
from typing import Any

from r1pipe.config import ParentRef, RunConfig, to_mapping
from r1pipe.config.changes import changes, listed
from r1pipe.config.data import USED
from r1pipe.config.groups import options, read
from r1pipe.core.paths import RunFolder
from r1pipe.runs.files import read_object
from r1pipe.runs.lineage.lookup import is_run


def settings_of(parent: ParentRef, given: set[str]) -> list[str]:
    """Overrides that restore a checkpoint's model and its run's data, except for the keys in `given`."""
    taken = [] if "model" in given else model_settings(Path(parent.checkpoint))
    config = config_of(parent)
    if config:
        taken += [f"pipeline={json.dumps(config['pipeline'])}", f"seed={config['seed']}"]
        taken += [] if "data" in given else data_settings(config["data"])
    return [line for line in taken if line.partition("=")[0] not in given]


def config_of(parent: ParentRef) -> dict[str, Any] | None:
    """The config.json of the run that made a checkpoint; None for one that was bundled or imported."""
    run = RunFolder(Path(parent.checkpoint).parent.parent)
    return read_object(run.config) if is_run(run.path) else None


def data_settings(data: dict[str, Any]) -> list[str]:
    """Overrides that describe a run's data."""
    keys = [key for key in USED[data["kind"]] if key in data]
    return [f"data={data['name']}", *(f"data.{key}={hydra(data[key])}" for key in keys)]


def measured_data(parent: ParentRef, config: RunConfig) -> str:
    """One line on what a checkpoint is evaluated on, and how that differs from its own run's data."""
    evaluation, own = config.stage.eval, config_of(parent)
    line = f"evaluating on data={config.data.name}, split {evaluation.split}"
    if own is None:
        return line
    keys = ("data", "seed")
    before, after = ({key: mapping[key] for key in keys} for mapping in (own, to_mapping(config)))
    if before == after:
        return f"{line}, as run {parent.run_id} was"
    return f"{line}; run {parent.run_id} had other data ({listed(changes(before, after))})"


def model_settings(checkpoint: Path) -> list[str]:
    """Overrides that describe a checkpoint's shape: the nearest model of conf/, and what differs."""
    published = read_object(checkpoint / "config.json")
    apart = {}
    for name in options("model"):
        shape = read(f"model/{name}")
        apart[name] = {
            key: published[key]
            for key in shape.keys() - UNLIKE
            if published.get(key, shape[key]) != shape[key]
        }
    name = min(apart, key=lambda option: len(apart[option]))
    return [f"model={name}", *(f"model.{key}={hydra(value)}" for key, value in sorted(apart[name].items()))]


def hydra(value: Any) -> str:
    """A value in Hydra's grammar, in which keys have no quotes."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{hydra(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(hydra, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


UNLIKE = frozenset(
    ("name", "initializer_range", "num_nextn_predict_layers")
)  # say nothing of what the weights compute
