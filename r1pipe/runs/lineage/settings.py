"""A checkpoint's shape and its run's data, seed and pipeline, as overrides for `r1pipe eval`."""

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

UNLIKE = frozenset(("name", "initializer_range", "num_nextn_predict_layers"))  # do not change what weights do


def settings_of(parent: ParentRef, given: set[str]) -> list[str]:
    """Overrides that restore a checkpoint's model and its run's data, except for the keys in `given`."""
    overrides = [] if "model" in given else model_settings(Path(parent.checkpoint))
    config = config_of(parent)
    if config:
        overrides += [f"pipeline={json.dumps(config['pipeline'])}", f"seed={config['seed']}"]
        overrides += [] if "data" in given else data_settings(config["data"])
    return [line for line in overrides if line.partition("=")[0] not in given]


def config_of(parent: ParentRef) -> dict[str, Any] | None:
    """The config.json of a checkpoint's run; None for a bundled or imported checkpoint."""
    run = RunFolder(Path(parent.checkpoint).parent.parent)
    return read_object(run.config) if is_run(run.path) else None


def data_settings(data: dict[str, Any]) -> list[str]:
    """Overrides that describe a run's data."""
    keys = [key for key in USED[data["kind"]] if key in data]
    return [f"data={data['name']}", *(f"data.{key}={hydra(data[key])}" for key in keys)]


def measured_data(parent: ParentRef, config: RunConfig) -> str:
    """One line: the evaluation's data, and how it differs from the data of the checkpoint's run."""
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
    """Overrides that describe a checkpoint's shape: the nearest model of conf/, and the keys that differ."""
    published = read_object(checkpoint / "config.json")
    differences = {}
    for name in options("model"):
        shape = read(f"model/{name}")
        keys = [key for key in shape.keys() - UNLIKE if published.get(key, shape[key]) != shape[key]]
        differences[name] = sorted(keys)
    name = min(differences, key=lambda option: len(differences[option]))
    return [f"model={name}", *(f"model.{key}={hydra(published[key])}" for key in differences[name])]


def hydra(value: Any) -> str:
    """A value in Hydra's grammar, where keys have no quotes."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{hydra(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(hydra, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
