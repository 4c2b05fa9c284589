"""What a Slurm job runs on the first of its machines: `python -m r1pipe.launch.batch RUN`.

Slurm sends SIGUSR1 some time before the job's limit (`#SBATCH --signal`), and where its administrators want
it, before a preemption: the ranks save and leave, and the job goes back into the queue. SIGTERM saves and
ends it.
"""

import os
import signal
import sys
import time
from types import FrameType

from r1pipe.config import read_config
from r1pipe.core.errors import EnvironmentProblem, R1pipeError
from r1pipe.core.paths import RunFolder
from r1pipe.launch import pipeline, slurm
from r1pipe.launch.run_plan import Action, RunPlan
from r1pipe.runs import locks
from r1pipe.runs.files import write_json

LOOK_S = 1.0  # how often a restarted job looks whether the run is free


class Batch:
    def __init__(self, run: RunFolder):
        self.run, self.job = run, os.environ["SLURM_JOB_ID"]
        self.is_to_go_on = False
        signal.signal(signal.SIGUSR1, self._handle_signal)

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        self.is_to_go_on = True
        os.kill(os.getpid(), signal.SIGTERM)

    def end(self) -> int:
        """Run the stage; its exit code."""
        write_json(self.run.slurm, {"job": int(self.job)})
        config = read_config(self.run.config)
        wait_for_lease(self.run)
        code = pipeline.run_stage(RunPlan(config, self.run, self._action()))
        if self.is_to_go_on and not self.run.record.exists():
            slurm.requeue(self.job)
        else:
            write_json(self.run.slurm, {"job": int(self.job), "code": code})
        return code

    def _action(self) -> Action:
        return Action.SKIP if self.run.record.exists() else Action.RESUME


def wait_for_lease(run: RunFolder) -> None:
    """After a restart by Slurm nobody else has the run, but a machine that is gone could not say so."""
    limit_s = locks.LEASE_S + LOOK_S  # a last look after the lease's end
    ends_at = time.monotonic() + limit_s if "SLURM_RESTART_COUNT" in os.environ else 0.0
    while time.monotonic() < ends_at:
        try:
            locks.check_not_running(run)
        except EnvironmentProblem:
            time.sleep(LOOK_S)
        else:
            return


def main(words: list[str]) -> int:
    run = RunFolder(words[0])
    try:
        return Batch(run).end()
    except R1pipeError as error:
        print(f"r1pipe: {error}", file=sys.stderr, flush=True)
        write_json(run.slurm, {"job": int(os.environ["SLURM_JOB_ID"]), "code": 2})
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
