"""Run on two ranks, from test_transfer.py: distillations whose engines share out weights."""

import json
import sys
from pathlib import Path

from rl_runs import metrics_of
from tiny_runs import load_stage

from r1pipe.train.engine.discovery import discover
from r1pipe.train.engine.patches import exit_immediately_with

folder = Path(sys.argv[1])
for run in sorted(folder.glob("distill-*")):
    load_stage("distill").main(str(run))
if discover().rank == 0:
    found = {run.name: metrics_of(run) for run in sorted(folder.glob("distill-*"))}
    (folder / "found.json").write_text(json.dumps(found))
exit_immediately_with(0)
