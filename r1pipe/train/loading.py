"""Load the models that a job trains or reads, checked against the run's config."""

from functools import partial
from pathlib import Path
from typing import Any

from r1pipe.config import EngineConfig, HFConfig, ParentRef
from r1pipe.core.errors import CheckpointError
from r1pipe.model import DeepseekV3, Policy, load_pretrained
from r1pipe.model.hf import HFModel, lora
from r1pipe.model.training import set_precision
from r1pipe.runs import checkpoints, heartbeat
from r1pipe.runs.lineage.fit import check_parent_fits
from r1pipe.train.engine.frozen import FrozenModel
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.engine.sharded import Prepare, ShardedWeights, as_it_is, load_for_rank, new_sharded
from r1pipe.train.rollout import WholeWeights
from r1pipe.train.run import Run


def load_model(
    run: Run[Any],
    parent: ParentRef | None,
    again: bool = False,
    prepare: Prepare = as_it_is,
    for_engine: bool = False,
) -> Policy:
    """The parent's model, after checking its files' hashes; without a parent, random weights.

    At ZeRO level 3 it is sharded, and all ranks call; `for_engine` (or a FrozenModel), also in a pipeline
    and with expert parallelism: a rank then reads its own layers and experts alone. `again`: this job has
    checked the hashes. `prepare` as in load_sharded. Weights that are stored in bfloat16 become float32 with
    engine.precision=fp32: in bfloat16 small updates would be lost. Raises CheckpointError.
    """
    shape, engine = run.config.model, run.config.engine
    sharded = engine.zero_level == 3
    with heartbeat.at("loading weights", patient=parent is None):
        if parent is None:
            if isinstance(shape, HFConfig):
                raise CheckpointError("model=hf has no random weights; give parent=CHECKPOINT")
            drawn = run.generator("weights")
            if sharded:
                return new_sharded(shape, drawn, engine, prepare)
            new = DeepseekV3(shape, drawn)
            prepare(new)
            return new
        if run.rank == 0 and not again:
            checkpoints.verify(parent.checkpoint, parent.hash)
        if parent == run.config.weights_from:
            check_parent_fits(parent, shape)
        folder, dense = Path(parent.checkpoint), shape if isinstance(shape, HFConfig) else None
        attention, longest = (dense.attention, dense.max_position_embeddings) if dense else (None, None)
        if sharded or for_engine:
            model = load_for_rank(folder, engine, prepare, attention, longest)
        else:
            model = load_pretrained(folder, attention, longest)
        return model.float() if engine.precision == "fp32" and not sharded else model


def load_weights(
    run: Run[Any], parent: ParentRef, ranks: Ranks
) -> WholeWeights | ShardedWeights | FrozenModel:
    """The parent's weights, to draw from; all ranks call. Raises CheckpointError."""
    engine = run.config.engine
    if engine.zero_level < 3 and (engine.pipeline > 1 or engine.expert_parallel > 1):
        return FrozenModel(load_frozen(run, parent), engine)
    model = load_model(run, parent)
    if engine.zero_level < 3:
        model = model.to(ranks.device)
    set_precision(model, engine, ranks.device)
    model.eval()
    return ShardedWeights(model) if engine.zero_level == 3 else WholeWeights(model)


def load_frozen(run: Run[Any], parent: ParentRef | None, again: bool = False) -> Policy:
    """A model for a FrozenModel. `again` as above; all ranks call. Raises CheckpointError."""
    engine = run.config.engine
    prepare = as_it_is if engine.zero_level == 3 else sharing_out(engine)
    return load_model(run, parent, again, prepare, for_engine=True)


def load_policy(run: Run[Any], again: bool = False, freeze_mtp: bool = False) -> Policy:
    """What the stage trains, for an Engine: with `model.lora.rank` it has adapters. `again` as above."""
    shape, share_out = run.config.model, sharing_out(run.config.engine)

    def prepare(model: Policy) -> None:
        if freeze_mtp:
            model.freeze_mtp()
        share_out(model)

    model = load_model(run, run.config.weights_from, again, prepare, for_engine=True)
    if isinstance(shape, HFConfig) and shape.lora.rank:
        assert isinstance(model, HFModel)
        lora.add(model, shape.lora, run.seed("adapters"))
    return model


def sharing_out(engine: EngineConfig) -> Prepare:
    """Leaves each rank its share of the experts, where ranks share them out."""
    if engine.expert_parallel == 1:
        return as_it_is
    from r1pipe.train.engine import expert_parallel  # imports DeepSpeed

    return partial(expert_parallel.share_out, config=engine, ranks=Ranks(engine))
