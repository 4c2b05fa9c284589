"""Run on two ranks, from test_head.py: ranks with other numbers of chunks and batches."""

import json
import sys
from pathlib import Path

import torch
from jobs import OPTIM, ROUTER, engine_config
from test_head import HIDDEN, ROLLOUTS, SHAPE, corrected, model, targets

from r1pipe.model import logprobs
from r1pipe.model.kernels import training as kernels
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.patches import exit_immediately_with
from r1pipe.train.rl.update import update

torch.set_num_threads(1)
kernels.usable = lambda *given, **few: False  # they loop in one call as it is
logprobs.LOGITS_IN_MEMORY = 2 * SHAPE.vocab_size
found = {}
for level, precision in ((2, "fp32"), (3, "fp32"), (2, "bf16"), (3, "bf16")):
    engine = Engine(model(), OPTIM, ROUTER, engine_config(2, level, precision, "fp32"), total_steps=10)
    whole = engine.module.lm_head.weight.numel() > 0
    assert whole == (level != 3), "a head that is not partitioned shows nothing"
    count = 3 if engine.rank else 8  # tokens: two chunks and four

    def loss(count: int = count, engine: Engine = engine) -> torch.Tensor:
        hidden_ND = engine.module.hidden(HIDDEN[:, :count]).flatten(0, 1)
        return -engine.module.lm_head(hidden_ND, targets(count)).sum() / 11 * 2

    stats = [engine.train_step([loss]) for _ in range(2)]
    metrics = update(engine, ROLLOUTS[engine.rank :: 2], corrected(), None)
    corrections = [
        metrics[f"sampling/importance_sampling_ratio/{name}"] for name in ("mean", "max", "capped")
    ]
    found[f"{level} {precision}"] = [*((s.loss, s.grad_norm) for s in stats), corrections]
if engine.rank == 0:
    (Path(sys.argv[1]) / "found.json").write_text(json.dumps(found))
exit_immediately_with(0)
