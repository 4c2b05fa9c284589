"""Run on two ranks, from test_routing_replay.py: updates with replayed experts at each ZeRO
level and one with live ones, and what the weights became."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from jobs import OPTIM, ROUTER, engine_config
from rl_runs import objective
from shapes import ours
from test_routing_replay import CONFIG, rollouts

from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.patches import exit_immediately_with
from r1pipe.train.rl.update import update

torch.set_num_threads(1)
found: dict[str, list[float]] = {}
for name, level, replay in (
    ("0", 0, True),
    ("1", 1, True),
    ("2", 2, True),
    ("3", 3, True),
    ("live", 0, False),
):
    engine = Engine(ours(CONFIG), OPTIM, ROUTER, engine_config(2, level), total_steps=10)
    correction = {"importance": "token_truncate", "importance_cap": 2.0}
    stage = replace(objective(**correction), replay_routing=replay, minibatches=1, inner_epochs=2)
    metrics = update(engine, rollouts(ours(CONFIG))[engine.rank :: 2], stage, None)
    with engine.gathered() as model:
        weights = sum(p.double().abs().sum().item() for p in model.parameters())
    found[name] = [metrics["train/grad_norm"], metrics["train/loss"], metrics["router/max_vio"], weights]
if engine.rank == 0:
    (Path(sys.argv[1]) / "found.json").write_text(json.dumps(found))
exit_immediately_with(0)
