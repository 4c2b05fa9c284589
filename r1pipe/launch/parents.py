"""Resolves the checkpoints that a user names, and fills a run's parents into its config before launch."""

import shlex
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from r1pipe.config import STAGE_TYPES, EvaluateConfig, HFConfig, ParentRef, RunConfig, read_config
from r1pipe.config.answerer import is_server
from r1pipe.core.errors import CheckpointError, ConfigError, DataError, nearest
from r1pipe.core.paths import RunFolder
from r1pipe.runs import checkpoints
from r1pipe.runs.files import read_object
from r1pipe.runs.lineage import lookup
from r1pipe.runs.lineage.fit import check_parent_fits, check_same_chat_format
from r1pipe.runs.lineage.published import adopt, is_published
from r1pipe.tracking import resolve_model

OTHERS = "a Hugging Face folder, or a server's URL (http://HOST:PORT/v1)"  # that a teacher or judge may be
NOTHING: Mapping[str, ParentRef] = {}


class Unknown(CheckpointError):
    """A name that is no checkpoint's."""


def resolve(name: str, search: lookup.SearchPath) -> ParentRef:
    """The checkpoint that a user means by `name`. Raises CheckpointError naming the nearest existing one."""
    if name.startswith("models:/"):
        registered = resolve_model(name, search.root, search.tracking_uri)
        return lookup.checkpoint_of_folder(Path(lookup.relocated(registered, search.root).checkpoint))
    if name in STAGE_TYPES:
        return lookup.checkpoint_of_stage(name, search)
    if name == lookup.BUNDLED:
        return lookup.bundled()
    for path in (search.root / name, Path(name)):
        if lookup.is_run(path):
            return lookup.checkpoint_of_run(RunFolder(path.resolve()))
        if path.exists() and is_published(path):
            return adopt(path, search.root)
        if path.is_dir():
            shape = path / "config.json"
            if shape.is_file() and not (path / checkpoints.MANIFEST).exists():
                model_type = read_object(shape).get("model_type")
                if isinstance(model_type, str):  # published weights
                    raise CheckpointError(
                        f"{path} holds published weights (model_type {model_type}); import them first: "
                        f"r1pipe import {shlex.quote(str(path))}"
                    )
            return lookup.checkpoint_of_folder(path)
    run_ids = [run.run_id for run in lookup.run_folders(search.root) if run.record.exists()]
    raise Unknown(f"no checkpoint {name}; {nearest(name, [lookup.BUNDLED, *STAGE_TYPES, *run_ids])}")


def with_parents(
    config: RunConfig, from_recipe: Mapping[str, ParentRef] = NOTHING, later: Collection[str] = ()
) -> RunConfig:
    """The config with its parents. Raises CheckpointError where one is missing or does not fit.

    For a recipe, `from_recipe` holds the checkpoints of its earlier stages, and `later` names the stages
    still to come: their old runs are no parents, or running the recipe twice would give different results.
    """
    search, stage = lookup.SearchPath.of(config), config.stage

    def parent_of(name: str, as_data: bool) -> ParentRef:
        return from_recipe.get(name) or lookup.checkpoint_of_stage(name, search, later, as_data)

    try:
        weights = None
        if config.parent is not None:
            weights = resolve(config.parent, search)
        elif stage.starts_from is not None:
            weights = parent_of(stage.starts_from, as_data=False)
            if isinstance(config.model, HFConfig) and weights.run_id == lookup.BUNDLED:
                weights = adopt(Path(config.model.path), search.root)  # the base of such a pipeline
        reads = {name: parent_of(name, as_data=True) for name in stage.reads}
        teacher = checkpoint_named("teacher", config.teacher, search)
        judge = checkpoint_named("judge", config.judge, search)
    except CheckpointError:
        unfinished = unfinished_config(config)
        if unfinished is None:
            raise
        filled = lookup.with_relocated_parents(unfinished, search.root)
        weights, reads = filled.weights_from, filled.reads_from
        teacher, judge = filled.teacher_from, filled.judge_from
    if weights is not None:
        check_parent_fits(weights, config.model)
    check_same_chat_format(weights, reads.values(), config.chat.system)
    filled = replace(config, weights_from=weights, reads_from=reads, teacher_from=teacher, judge_from=judge)
    return with_baseline(filled, search)


def with_baseline(config: RunConfig, search: lookup.SearchPath) -> RunConfig:
    """The config with the folder of the checkpoint that a judge compares with. Raises CheckpointError, and
    DataError where it is a file that is missing."""
    stage = config.stage
    if not isinstance(stage, EvaluateConfig) or stage.judge is None or stage.judge.baseline is None:
        return config
    name = stage.judge.baseline
    if name.endswith(".jsonl") and not Path(name).is_file():
        raise DataError(f"stage.judge.baseline={name} is no file; give a JSONL file of answers")
    if is_server(name) or name.endswith(".jsonl"):
        return config
    found = checkpoint_named("stage.judge.baseline", name, search)
    assert found is not None
    judge = replace(stage.judge, baseline=found.checkpoint)
    return replace(config, stage=replace(stage, judge=judge))


def checkpoint_named(key: str, name: str | None, search: lookup.SearchPath) -> ParentRef | None:
    """The checkpoint of a teacher or judge, named with `key`; None for a server or nobody. Raises
    CheckpointError."""
    if name is None or is_server(name):
        return None
    try:
        return resolve(name, search)
    except Unknown as error:
        raise CheckpointError(f"{key}={name}: {error}; or give {OTHERS}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{key}={name}: {error}") from None


def unfinished_config(config: RunConfig) -> RunConfig | None:
    """The config of this stage's newest run, if that is unfinished: it may have been copied here without the
    runs of its parents. A dry run, whose parents may be open, does not count."""
    key = _named(config)
    for run in reversed(lookup.run_folders(Path(config.root))):
        if not run.run_id.startswith(f"{config.stage.name}-"):
            continue
        try:
            stored = read_config(run.config)
        except ConfigError:  # damaged, or of another version
            continue
        if _named(stored) == key:
            parents = [*filter(None, [stored.weights_from]), *stored.reads_from.values()]
            is_complete = all(parent.run_id for parent in parents)
            return stored if is_complete and not run.record.exists() else None
    return None


def _named(config: RunConfig) -> tuple[object, ...]:
    """What a user has named of a run and its parents."""
    parents = (config.parent, config.teacher, config.judge)
    return (config.pipeline, config.seed, config.stage.name, *parents)
