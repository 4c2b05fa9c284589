"""Jobs of Slurm: the script for sbatch, in the run folder, and what becomes of a job that was submitted.

The script runs `python -m r1pipe.launch.batch RUN` on the first of the job's machines. That holds the run and
watches it as `r1pipe run` does elsewhere, and starts the agents with srun. Slurm runs the script again after
a preemption or the loss of a machine, and the run resumes.
"""

import os
import re
import shlex
import signal
import subprocess
import time
from contextlib import closing
from types import FrameType

from r1pipe.config import RunConfig
from r1pipe.core.errors import EnvironmentProblem, record_error
from r1pipe.core.paths import RunFolder
from r1pipe.launch.hosts import package_folder, python_under_slurm
from r1pipe.launch.progress import Display
from r1pipe.launch.watch import resume_hint
from r1pipe.runs import stopping
from r1pipe.runs.files import read_json, write_json, write_text

LOG = "slurm.txt"  # in a run's log/: of the batch script, in all sessions
MARGIN_S = 60  # from the end of engine.grace_s to the time limit
ASK_EVERY_S = 5.0  # seconds; squeue is a call to the scheduler that all users share
POLL_S = 0.1
UNKNOWN = "Invalid job id"  # scontrol's word for a job that ended some minutes ago
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "DEADLINE", "OUT_OF_MEMORY", "BOOT_FAIL", "NODE_FAIL")
FIELD = re.compile(r"\b(JobState|Reason)=(\S+)")


def is_inside() -> bool:
    """Whether this process is in a Slurm job, and need not submit one."""
    return "SLURM_JOB_ID" in os.environ


def script(config: RunConfig, run: RunFolder) -> str:
    """What sbatch gets."""
    engine = config.engine
    assert engine.slurm is not None
    asked = engine.slurm
    options = [
        f"--job-name={run.run_id}",
        f"--output={shlex.quote(str(run.log / LOG)).replace('%', '%%')}",
        "--open-mode=append",
        f"--nodes={asked.nodes}",
        "--ntasks-per-node=1",
        "--requeue",
        f"--signal=B:{signal.SIGUSR1.name[3:]}@{int(engine.grace_s) + MARGIN_S}",
    ]
    named = {"partition": asked.partition, "account": asked.account, "time": asked.time}
    options += [f"--{name}={value}" for name, value in named.items() if value is not None]
    python = python_under_slurm(engine)
    path, folder = shlex.quote(str(run.path)), shlex.quote(package_folder())
    return "\n".join(
        [
            "#!/bin/sh",
            *(f"#SBATCH {line}" for line in [*options, *asked.lines]),
            f"exec env PYTHONPATH={folder} {python} -u -m r1pipe.launch.batch {path}",
            "",
        ]
    )


def submit(config: RunConfig, run: RunFolder) -> int:
    """Submit the script; the job's id. Raises EnvironmentProblem with what sbatch says."""
    write_text(run.script, script(config, run))
    done = _ask("sbatch", "--parsable", str(run.script))
    if done.returncode:
        raise EnvironmentProblem(f"sbatch refuses {run.script}: {' '.join(done.stderr.split())}")
    job = int(done.stdout.split(";")[0])
    write_json(run.slurm, {"job": job})
    return job


def _ask(*words: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise EnvironmentProblem(
            f"the command {words[0]} is missing; give the command where Slurm's are (Debian: slurm-client)"
        ) from None


def state(job: int) -> tuple[str, str]:
    """Slurm's state of a job and the reason for it; ("", "") where Slurm does not know it (any more)."""
    done = _ask("scontrol", "show", "job", str(job))
    if done.returncode and UNKNOWN not in done.stderr:  # its controller restarts, or is overloaded
        return "UNREACHABLE", " ".join(done.stderr.split())
    found = dict(FIELD.findall(done.stdout))
    return found.get("JobState", ""), found.get("Reason", "")


def job_of(run: RunFolder) -> int | None:
    """The job of a run that waits or runs."""
    job = read_json(run.slurm).get("job")
    if job is None:
        return None
    now, _ = state(job)
    return job if now and now not in OVER else None


class Submitted:
    """A job in Slurm's hands: `follow` it, then `end`. It has the methods of launch.job.Job.

    A signal to this command leaves the job alone: it may have waited for its machines for days.
    """

    is_owner = True  # of the run's place in a recipe

    def __init__(self, config: RunConfig, run: RunFolder, job: int):
        self.run, self.job = run, job
        self.received_signal = 0
        self.display = Display(run.path, config.stage.name)
        self._state, self._asked_at = "", 0.0

    def follow(self) -> None:
        """Show the job until its record exists, it is over, or this command is to let go of it."""
        with stopping.handling(self._handle_signal), closing(self.display):
            while not self.run.record.exists() and not self.received_signal and not self._is_over():
                self.display.poll()
                time.sleep(POLL_S)

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        self.received_signal = number

    def _is_over(self) -> bool:
        if time.monotonic() - self._asked_at < ASK_EVERY_S:
            return False
        now, reason = state(self.job)
        self._asked_at = time.monotonic()
        if now and now != self._state:
            self._state = now
            why = f" ({reason})" if reason not in ("", "None") else ""
            self.display.say(f"{self.run.run_id}: Slurm's job {self.job} is {now.lower()}{why}")
        return now in OVER or not now

    def end(self) -> int:
        """The job's exit code; that of the signal which made this command let go."""
        if self.run.record.exists():
            return 0
        if self.received_signal:
            return 128 + self.received_signal
        code = read_json(self.run.slurm).get("code")
        if code is None:
            how = self._state.lower() or "it does not know it"
            gone = f"Slurm ended its job {self.job} ({how}; its log: {self.run.log / LOG})"
            record_error(self.run.error, f"{self.run.run_id}: {gone}; {resume_hint(self.run)}")
        return code or 1


def let_go(run: RunFolder) -> str:
    """What is said where the command let go of a job that goes on; "" where the job has ended."""
    submitted = read_json(run.slurm)
    if is_inside() or "job" not in submitted or "code" in submitted:
        return ""
    job = submitted["job"]
    return (
        f"{run.run_id}: Slurm's job {job} goes on without this command; the same command follows it again, "
        f"`scancel --batch --signal=TERM {job}` saves and ends it"
    )


def requeue(job: str) -> None:
    """Let Slurm start the job again. Raises EnvironmentProblem."""
    done = _ask("scontrol", "requeue", job)
    if done.returncode:
        raise EnvironmentProblem(f"scontrol requeue {job}: {done.stderr.strip()}")
