"""Run on two ranks, from test_doctor.py: the checks under ZeRO-3, and faults of one rank."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

from tiny_runs import tiny_run

from r1pipe.config import RLConfig
from r1pipe.doctor import CHECKS, Context, examine, policy
from r1pipe.doctor.context import limits
from r1pipe.train.engine.discovery import discover
from r1pipe.train.engine.patches import exit_immediately_with
from r1pipe.train.run import open_run

folder = Path(sys.argv[1])
rank = discover().rank
own = folder / f"run-{rank}"  # each writes the same config; rank 0's run folder is the run's
words = ["engine.ranks=2", "engine.zero_level=3", "stage.sampling.max_tokens=24"]
tiny_run(own, "stage=grpo", *words)
with open_run(own, RLConfig) as run:
    run.folder = type(run.folder)(folder / "run-0")
    # an odd number of prompts, which two ranks cannot share
    context = Context(run, replace(limits(), rows=40, judged=4, probe_prompts=3, probe_group=2))
    found = {"healthy": [asdict(one) for one in examine(context)], "groups": len(context.probe.groups)}
    del context.trained
    if rank == 1:
        for rollout in context.probe.rollouts:
            rollout.completion.logprobs = [logprob + 0.5 for logprob in rollout.completion.logprobs]
        policy.different = lambda model, place: ["lm_head.weight"]
    for name in [name for name in CHECKS if name not in ("logprobs", "save and load")]:
        del CHECKS[name]
    found["faults"] = [asdict(one) for one in examine(context)]
if rank == 0:
    (folder / "found.json").write_text(json.dumps(found))
exit_immediately_with(0)
