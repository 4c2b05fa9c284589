"""A checkpoint's own shape, data and pipeline, as overrides: what `r1pipe eval` goes by."""

import json
from pathlib import Path
from typing import Any

from r1pipe.config.groups import options, read
from r1pipe.config.schema import ParentRef
from r1pipe.core.paths import RunFolder
from r1pipe.runs.jsonfile import read_object
from r1pipe.runs.lineage.places import is_run


def settings_of(parent: ParentRef, given: set[str]) -> list[str]:
    """Overrides that take a checkpoint as its run left it, where the user (keys in `given`) says nothing."""
    run = RunFolder(Path(parent.checkpoint).parent.parent)
    taken = [] if "model" in given else model_settings(Path(parent.checkpoint))
    if is_run(run.path):
        config = read_object(run.config)
        taken += [f"data={config['data']['name']}", f"pipeline={json.dumps(config['pipeline'])}"]
    return [line for line in taken if line.partition("=")[0] not in given]


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
    return json.dumps(value)


UNLIKE = frozenset(
    ("name", "initializer_range", "num_nextn_predict_layers")
)  # say nothing of what the weights compute
