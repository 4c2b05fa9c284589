"""A run's parents, looked up and filled into its config before launch."""

from collections.abc import Collection, Mapping
from dataclasses import replace

from r1pipe.config import ParentRef, RunConfig
from r1pipe.runs.lineage.fit import check_parent_fits, check_same_chat_format
from r1pipe.runs.lineage.places import Place, of_stage, resolve

NOTHING: Mapping[str, ParentRef] = {}


def with_parents(
    config: RunConfig, made: Mapping[str, ParentRef] = NOTHING, later: Collection[str] = ()
) -> RunConfig:
    """The config with its edges filled in. Raises CheckpointError where a parent is missing or does not fit.

    In a walk of a recipe, `made` holds what its earlier stages made, and `later` names those to come: a run
    that one of them left behind is nobody's parent now, or a second walk would differ from the first.
    """
    place, stage = Place.of(config), config.stage
    weights = None
    if config.parent is not None:
        weights = resolve(config.parent, place)
    elif stage.starts_from is not None:
        weights = made.get(stage.starts_from) or of_stage(stage.starts_from, place, later)
    if weights is not None:
        check_parent_fits(weights, config.model)
    reads = {name: made.get(name) or of_stage(name, place, later, as_data=True) for name in stage.reads}
    check_same_chat_format(weights, reads.values())
    return replace(config, weights_from=weights, reads_from=reads)


def with_open_parents(config: RunConfig) -> RunConfig:
    """For a dry run: edges that name their stages but no checkpoint, so that no job can start from them."""
    stage = config.stage
    weights = ParentRef(stage.starts_from, "", "", "") if stage.starts_from else None
    reads = {name: ParentRef(name, "", "", "") for name in stage.reads}
    return replace(config, weights_from=weights, reads_from=reads)
