"""The peak that a machine's speed is a share of: a large square matmul through torch, in the job's dtype."""

import torch

from r1pipe.bench.config import DTYPES, Job
from r1pipe.bench.turns import Turns


def work(job: Job, turns: Turns) -> None:
    side = job.case.prompt
    left = torch.randn(side, side, dtype=getattr(torch, DTYPES[job.setting.dtype]), device=job.device)
    right = torch.randn_like(left)
    turns.run(lambda: left @ right)
