"""Load the models that a job trains or reads, checked against the run's config."""

from pathlib import Path
from typing import Any

from r1pipe.config import HFConfig, ParentRef
from r1pipe.core.errors import CheckpointError
from r1pipe.model import DeepseekV3, Policy, load_pretrained
from r1pipe.model.hf import HFModel, lora
from r1pipe.runs import checkpoints, heartbeat
from r1pipe.runs.lineage.fit import check_parent_fits
from r1pipe.train.engine.sharded import load_sharded, new_sharded
from r1pipe.train.run import Run


def load_model(
    run: Run[Any], parent: ParentRef | None, for_engine: bool = False, again: bool = False
) -> Policy:
    """The parent's model, after checking its files' hashes; without a parent, random weights.

    `for_engine`: for an Engine or a FrozenModel; at ZeRO level 3 it is in shares, and all ranks call.
    `again`: this job has checked the hashes. A model of transformers may be stored in bfloat16;
    engine.precision=fp32 computes in float32. Raises CheckpointError.
    """
    shape, engine = run.config.model, run.config.engine
    # experts that ranks share out are taken from a whole model
    in_shares = for_engine and engine.zero_level == 3 and engine.expert_parallel == 1
    with heartbeat.at("loading weights", patient=parent is None):
        if parent is None:
            if isinstance(shape, HFConfig):
                raise CheckpointError("model=hf has no random weights; give parent=CHECKPOINT")
            drawn = run.generator("weights")
            return new_sharded(shape, drawn, engine) if in_shares else DeepseekV3(shape, drawn)
        if run.rank == 0 and not again:
            checkpoints.verify(parent.checkpoint, parent.hash)
        if parent == run.config.weights_from:
            check_parent_fits(parent, shape)
        of_hf = (shape.attention, shape.max_position_embeddings) if isinstance(shape, HFConfig) else ()
        if in_shares:
            return load_sharded(Path(parent.checkpoint), engine, *of_hf)
        model = load_pretrained(parent.checkpoint, *of_hf)
        return model.float() if of_hf and engine.precision == "fp32" else model


def load_policy(run: Run[Any], again: bool = False) -> Policy:
    """What the stage trains, for an Engine: with `model.lora.rank` it has adapters. `again`: as above."""
    model, shape = load_model(run, run.config.weights_from, True, again), run.config.model
    if isinstance(shape, HFConfig) and shape.lora.rank:
        assert isinstance(model, HFModel)
        lora.add(model, shape.lora, run.seed("adapters"))
    return model
