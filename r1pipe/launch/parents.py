"""Checkpoints that a user names, and a run's parents, looked up and filled into its config before launch."""

import shlex
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from r1pipe.config import STAGE_TYPES, ParentRef, RunConfig, read_config
from r1pipe.core.errors import CheckpointError, ConfigError, nearest
from r1pipe.core.paths import RunFolder
from r1pipe.runs import checkpoints
from r1pipe.runs.files import read_object
from r1pipe.runs.lineage.fit import check_parent_fits, check_same_chat_format
from r1pipe.runs.lineage.lookup import (
    BUNDLED,
    SearchPath,
    bundled,
    checkpoint_of_folder,
    checkpoint_of_run,
    checkpoint_of_stage,
    is_run,
    relocated,
    run_folders,
    with_relocated_parents,
)
from r1pipe.tracking import resolve_model

NOTHING: Mapping[str, ParentRef] = {}


def resolve(name: str, place: SearchPath) -> ParentRef:
    """The checkpoint that a user means by `name`. Raises CheckpointError naming the nearest known one."""
    if name.startswith("models:/"):
        registered = resolve_model(name, place.root, place.tracking_uri)
        return checkpoint_of_folder(Path(relocated(registered, place.root).checkpoint))
    if name in STAGE_TYPES:
        return checkpoint_of_stage(name, place)
    if name == BUNDLED:
        return bundled()
    for path in (place.root / name, Path(name)):
        if is_run(path):
            return checkpoint_of_run(RunFolder(path.resolve()))
        if path.is_dir():
            must_be_imported(path)
            return checkpoint_of_folder(path)
    known = [run.run_id for run in run_folders(place.root) if run.record.exists()]
    raise CheckpointError(f"no checkpoint {name}; {nearest(name, [*STAGE_TYPES, *known])}")


def must_be_imported(folder: Path) -> None:
    """Raises CheckpointError for published weights that `r1pipe import` has not taken in."""
    config = folder / "config.json"
    if config.is_file() and not (folder / checkpoints.MANIFEST).exists():
        model_type = read_object(config).get("model_type")
        if isinstance(model_type, str):
            raise CheckpointError(
                f"{folder} holds published weights (model_type {model_type}); take them in first: "
                f"r1pipe import {shlex.quote(str(folder))}"
            )


def with_parents(
    config: RunConfig, made: Mapping[str, ParentRef] = NOTHING, later: Collection[str] = ()
) -> RunConfig:
    """The config with its edges filled in. Raises CheckpointError where a parent is missing or does not fit.

    In a walk of a recipe, `made` holds what its earlier stages made, and `later` names those to come: a run
    that one of them left behind is nobody's parent now, or a second walk would differ from the first.
    """
    place, stage = SearchPath.of(config), config.stage
    try:
        weights = None
        if config.parent is not None:
            weights = resolve(config.parent, place)
        elif stage.starts_from is not None:
            weights = made.get(stage.starts_from) or checkpoint_of_stage(stage.starts_from, place, later)
        reads = {
            name: made.get(name) or checkpoint_of_stage(name, place, later, as_data=True)
            for name in stage.reads
        }
    except CheckpointError:
        half_done = half_done_run(config)
        if half_done is None:
            raise
        filled = with_relocated_parents(half_done, place.root)
        weights, reads = filled.weights_from, filled.reads_from
    if weights is not None:
        check_parent_fits(weights, config.model)
    check_same_chat_format(weights, reads.values())
    return replace(config, weights_from=weights, reads_from=reads)


def half_done_run(config: RunConfig) -> RunConfig | None:
    """The config of the newest run of this stage, if it is half done: its folder may have been copied without
    its parents'. A dry run, whose parents were left open, does not count."""
    wanted = (config.pipeline, config.seed, config.stage.name, config.parent)
    for run in reversed(run_folders(Path(config.root))):
        if not run.run_id.startswith(f"{config.stage.name}-"):
            continue
        try:
            known = read_config(run.config)
        except ConfigError:  # broken, or of another version
            continue
        if (known.pipeline, known.seed, known.stage.name, known.parent) == wanted:
            parents = [*filter(None, [known.weights_from]), *known.reads_from.values()]
            is_open = any(not parent.run_id for parent in parents)
            return None if run.record.exists() or is_open else known
    return None


def with_open_parents(config: RunConfig) -> RunConfig:
    """For a dry run: edges that name their stages but no checkpoint, so that no job can start from them."""
    stage = config.stage
    weights = ParentRef(stage.starts_from, "", "", "") if stage.starts_from else None
    reads = {name: ParentRef(name, "", "", "") for name in stage.reads}
    return replace(config, weights_from=weights, reads_from=reads)
