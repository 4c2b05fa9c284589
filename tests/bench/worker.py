"""One contestant: `python -m bench.worker JOB.json`, started by the referee."""

import importlib
import json
import sys
from pathlib import Path

from bench.config import Job
from bench.turns import Turns
from r1pipe.config.fields import build

MODULES = dict.fromkeys(["ours", "ours_fp8", "matmul", "copy"], "bench.ours")
MODULES |= {"transformers": "bench.transformers_peer", "trl": "bench.trl_peer"}


def main(path: str) -> None:
    """Do the job's work once per turn. Every contestant is a module with `work(job, turns)`, which may return
    a mapping of facts to report in the end."""
    turns = Turns()
    job = build(Job, json.loads(Path(path).read_text(encoding="utf-8")), "job")
    import torch

    torch.set_num_threads(job.threads)
    cuda = job.device == "cuda"
    if cuda:
        turns.wait_for_device = torch.cuda.synchronize
    facts = importlib.import_module(MODULES[job.contestant]).work(job, turns) or {}
    turns.finish(torch.cuda.max_memory_allocated() if cuda else None, **facts)


if __name__ == "__main__":
    main(sys.argv[1])
