"""Run by the launcher on two ranks, from test_engine.py: trains at each ZeRO level, writes what came out."""

import json
import math
import sys
from functools import partial
from pathlib import Path

import torch
from jobs import OPTIM, ROUTER, engine_config, tiny_model
from test_engine import STEPS, batch, loss_of

from r1pipe.model import Balance
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.patches import exit_immediately_with


def weighted(model, rows, weight):
    return loss_of(model, rows) * weight


def after_prompts(model):
    """RL's pass: rows that go on from prompts, whose last gate has a gradient from the balance loss alone."""
    prompts_PT, rows_BT = batch()[:2, :7], batch()[:4, :9]
    lengths_P, lengths_B = torch.tensor([7, 5]), torch.tensor([9, 4, 8, 6])
    balances = Balance.of_lengths(lengths_P, 7, True), Balance.of_lengths(lengths_B, 9, True)
    hidden_BTD = model.model.after_prompts(
        prompts_PT, lengths_P, rows_BT, torch.tensor([0, 0, 1, 1]), balances
    )
    return model.lm_head(hidden_BTD).float().square().mean() + 0.01 * sum(b.total() for b in balances)


torch.set_num_threads(1)
found = {}
for level in (0, 1, 2, 3):
    engine = Engine(tiny_model(), OPTIM, ROUTER, engine_config(2, level), total_steps=10)
    rows = batch()[engine.rank :: 2]
    # the first rank has one micro-batch, the second has two
    parts = [rows] if engine.rank == 0 else list(rows.split(2))
    shares = [(part, len(part) / len(rows)) for part in parts]
    micro_losses = [partial(weighted, engine.module, part, weight) for part, weight in shares]
    stats = [engine.train_step(micro_losses) for _ in range(STEPS)]
    with engine.gathered() as model:
        weights = sum(p.double().abs().sum().item() for p in model.parameters())
    found[level] = {
        "losses": [s.loss for s in stats],
        "norms": [s.grad_norm for s in stats],
        "loads": [s.loads_LE.tolist() for s in stats],
        "weights": engine.all_gather_objects(weights),
        "sums": engine.sum_over_ranks([1.0, engine.rank]),
    }
    going_on = Engine(tiny_model(), OPTIM, ROUTER, engine_config(2, level), total_steps=10)
    found[level]["after_prompts"] = [
        going_on.train_step([partial(after_prompts, going_on.module)]).grad_norm for _ in range(STEPS)
    ]
    engine.max_skipped = 1
    nothing = [partial(weighted, engine.module, rows, math.nan if engine.rank else 1.0)]
    broken = engine.train_step(nothing)  # the second rank's loss alone
    with engine.gathered() as model:
        after = sum(p.double().abs().sum().item() for p in model.parameters())
    found[level]["skipped"] = engine.all_gather_objects([broken.broken, broken.skipped, after == weights])
    engine.save(Path(sys.argv[1]) / f"level-{level}", {"step": STEPS})
    assert engine.load(Path(sys.argv[1]) / f"level-{level}") == {"step": STEPS}
if engine.rank == 0:
    (Path(sys.argv[1]) / "found.json").write_text(json.dumps(found))
exit_immediately_with(0)
