"""One contestant: `python -m r1pipe.bench.worker JOB.json`, started and spoken to by the referee."""

import importlib
import json
import sys
from pathlib import Path

from r1pipe.bench.config import Job
from r1pipe.bench.turns import Turns, nothing
from r1pipe.config.fields import build

CONTESTANTS = {
    "ours": "r1pipe.bench.ours",
    "ours_fp8": "r1pipe.bench.ours",
    "transformers": "r1pipe.bench.transformers_peer",
    "trl": "r1pipe.bench.trl_peer",
    "matmul": "r1pipe.bench.matmul",
}


def main(path: str) -> None:
    """Do the job's work once per turn. Every contestant is a module with `work(job, turns)`, which may return
    a mapping of what else there is to say."""
    job = build(Job, json.loads(Path(path).read_text(encoding="utf-8")), "job")
    turns = Turns()
    import torch

    torch.set_num_threads(job.threads)
    cuda = job.device == "cuda"
    turns.wait_for_device = torch.cuda.synchronize if cuda else nothing
    facts = importlib.import_module(CONTESTANTS[job.contestant]).work(job, turns) or {}
    turns.finish(torch.cuda.max_memory_allocated() if cuda else None, **facts)


if __name__ == "__main__":
    main(sys.argv[1])
