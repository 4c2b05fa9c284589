"""Run on two ranks, from test_buckets.py: weights in buckets at each ZeRO level."""

import json
import sys
from functools import partial
from pathlib import Path

import torch
from jobs import OPTIM, ROUTER, engine_config, tiny_model
from test_engine import batch, loss_of

from r1pipe.model.policy import load_pretrained, named_weights, own_tensors
from r1pipe.train.engine import engine as engines
from r1pipe.train.engine.discovery import discover
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.patches import exit_immediately_with

MOST = 8192  # bytes: some tensors are larger, most are smaller
settings = engines.deepspeed_config


def nothing_stays(*given):
    """DeepSpeed keeps small parameters on every rank; here all are small."""
    config = settings(*given)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


def published(model, hf: bool) -> dict[str, torch.Tensor]:
    """What a checkpoint would hold."""
    if not hf:
        return {name: tensor.clone() for name, tensor in named_weights(model).items()}
    from transformers.core_model_loading import revert_weight_conversion

    state = model.whole.state_dict()
    if model.whole.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return {name: t.clone() for name, t in revert_weight_conversion(model.whole, state).items()}


def of_level(make, level: int, hf: bool) -> dict:
    engine = Engine(make(), OPTIM, ROUTER, engine_config(2, level), total_steps=10)
    rows = batch()[engine.rank :: 2]
    engine.train_step([partial(loss_of, engine.module, rows)])
    with engine.gathered() as model:
        expected = published(model, hf)
    found, most, here = {}, 0, 0
    at_rest = sum(tensor.nbytes for _, tensor in own_tensors(engine.module))
    for bucket in engine.buckets(MOST):
        assert not found.keys() & bucket.keys()
        found |= {name: tensor.clone() for name, tensor in bucket.items()}
        most = max(most, sum(t.nbytes for t in bucket.values()) if len(bucket) > 1 else 0)
        here = max(here, sum(tensor.nbytes for _, tensor in own_tensors(engine.module)))
    engine.train_step([partial(loss_of, engine.module, rows)])  # it still trains
    return {
        "equal": found.keys() == expected.keys()
        and all(torch.equal(found[n], expected[n]) for n in expected),
        "largest_of_several": most,
        "most_here": here - at_rest,
        "whole": sum(t.nbytes for t in expected.values()),
        "largest_tensor": max(t.nbytes for t in made_whole(make)),
    }


def made_whole(make) -> list[torch.Tensor]:
    return [tensor for _, tensor in own_tensors(make())]


if __name__ == "__main__":
    torch.set_num_threads(1)
    engines.deepspeed_config = nothing_stays
    folder = Path(sys.argv[1])
    told = {"bundled": {level: of_level(tiny_model, level, False) for level in range(4)}}
    told["qwen3_moe"] = {3: of_level(partial(load_pretrained, folder / "qwen3_moe"), 3, True)}
    if discover().rank == 0:
        (folder / "found.json").write_text(json.dumps(told))
    exit_immediately_with(0)
