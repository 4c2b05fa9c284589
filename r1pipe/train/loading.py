"""Load the models that a job trains or reads, checked against the run's config."""

from pathlib import Path
from typing import Any

from r1pipe.config import HFConfig, ParentRef
from r1pipe.core.errors import CheckpointError
from r1pipe.model import DeepseekV3, Policy, load_pretrained
from r1pipe.model.hf import HFModel, lora
from r1pipe.model.training import set_precision
from r1pipe.runs import checkpoints, heartbeat
from r1pipe.runs.lineage.fit import check_parent_fits
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.engine.sharded import Prepare, Shares, as_it_is, load_layers, load_sharded, new_sharded
from r1pipe.train.rollout import Whole
from r1pipe.train.run import Run


def load_model(
    run: Run[Any],
    parent: ParentRef | None,
    again: bool = False,
    prepare: Prepare = as_it_is,
    for_engine: bool = False,
) -> Policy:
    """The parent's model, after checking its files' hashes; without a parent, random weights.

    At ZeRO level 3 it is in shares, and all ranks call; `for_engine` (or a FrozenModel), also in a pipeline:
    a rank then reads its own layers alone. `again`: this job has checked the hashes. `prepare` as in
    load_sharded. A model of transformers may be stored in bfloat16; engine.precision=fp32 computes in
    float32. Raises CheckpointError.
    """
    shape, engine = run.config.model, run.config.engine
    in_shares = engine.zero_level == 3
    with heartbeat.at("loading weights", patient=parent is None):
        if parent is None:
            if isinstance(shape, HFConfig):
                raise CheckpointError("model=hf has no random weights; give parent=CHECKPOINT")
            drawn = run.generator("weights")
            return new_sharded(shape, drawn, engine, prepare) if in_shares else DeepseekV3(shape, drawn)
        if run.rank == 0 and not again:
            checkpoints.verify(parent.checkpoint, parent.hash)
        if parent == run.config.weights_from:
            check_parent_fits(parent, shape)
        dense = shape if isinstance(shape, HFConfig) else None
        attention, longest = (dense.attention, dense.max_position_embeddings) if dense else (None, None)
        if in_shares:
            return load_sharded(Path(parent.checkpoint), engine, attention, longest, prepare)
        if engine.pipeline > 1 and for_engine:
            return load_layers(Path(parent.checkpoint), engine)
        model = load_pretrained(parent.checkpoint, attention, longest)
        return model.float() if dense and engine.precision == "fp32" else model


def load_weights(run: Run[Any], parent: ParentRef, ranks: Ranks) -> Whole | Shares:
    """The parent's weights, to draw from; all ranks call. Raises CheckpointError."""
    model = load_model(run, parent)
    if run.config.engine.zero_level < 3:
        model = model.to(ranks.device)
    set_precision(model, run.config.engine, ranks.device)
    model.eval()
    return Shares(model) if run.config.engine.zero_level == 3 else Whole(model)


def load_policy(run: Run[Any], again: bool = False, freeze_mtp: bool = False) -> Policy:
    """What the stage trains, for an Engine: with `model.lora.rank` it has adapters. `again` as above."""
    shape, engine = run.config.model, run.config.engine

    def prepare(model: Policy) -> None:
        if freeze_mtp:
            model.freeze_mtp()
        if engine.expert_parallel > 1:
            from r1pipe.train.engine import expert_parallel  # imports DeepSpeed

            expert_parallel.share_out(model, engine.expert_parallel, Ranks(engine))

    model = load_model(run, run.config.weights_from, again, prepare, for_engine=True)
    if engine.zero_level < 3:
        prepare(model)
    if isinstance(shape, HFConfig) and shape.lora.rank:
        assert isinstance(model, HFModel)
        lora.add(model, shape.lora, run.seed("adapters"))
    return model
