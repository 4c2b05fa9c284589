"""Slurm: the script for sbatch, and a job that was submitted; stand-ins for Slurm's commands."""

import os
import signal
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import House

from r1pipe.config import RunConfig
from r1pipe.config.changes import Change
from r1pipe.config.compose import compose
from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.paths import RunFolder
from r1pipe.launch import batch, pipeline, slurm
from r1pipe.launch.job import failure
from r1pipe.runs.files import read_json, write_json

WORDS = [
    "engine=slurm",
    "engine.accelerator=cpu",
    "engine.slurm.time=1-00:00:00",
    "engine.slurm.partition=gpu",
]


UNKNOWN = "#!/bin/sh\necho slurm_load_jobs error: Invalid job id specified >&2\nexit 1\n"


def config(*words: str) -> RunConfig:
    return compose(["stage=pretrain", "stage.batch_size=8", "model=small", *WORDS, *words]).config


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "runs" / "a run of 100%")
    run.create()
    return run


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what sbatch and scontrol answer, in files of their names; `asked` has the questions."""
    for name in ("sbatch", "scontrol"):
        script = tmp_path / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(
            f'#!/bin/sh\necho "{name} $*" >>{tmp_path}/asked\ncat {tmp_path}/{name} || exit 1\n'
        )
        script.chmod(0o755)
    (tmp_path / "sbatch").write_text("17;cluster\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm, "ASK_EVERY_S", 0.0)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return tmp_path


def state(answers: Path, name: str, reason: str = "None") -> None:
    partial = answers / "partial"
    partial.write_text(f"JobId=17 JobName=x\n   JobState={name} Reason={reason} Dependency=(null)\n")
    partial.rename(answers / "scontrol")


def test_the_script_asks_for_what_the_keys_say(run: RunFolder) -> None:
    words = ["engine.slurm.nodes=4", 'engine.slurm.lines=["--qos=long"]', "engine.grace_s=300"]
    text = slurm.script(config(*words, "engine.interpreter='/opt/{host}/my python'"), run)
    lines = text.splitlines()
    assert lines[0] == "#!/bin/sh" and lines[-1].startswith("exec env PYTHONPATH=")
    asked = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    wanted = {
        "--nodes=4",
        "--ntasks-per-node=1",
        "--requeue",
        "--time=1-00:00:00",
        "--partition=gpu",
        "--qos=long",
    }
    assert wanted < set(asked) and "--signal=B:USR1@360" in asked and "--account" not in text
    assert f"--output='{run.log}/slurm.txt'".replace("%", "%%") in asked
    shell = f'printf "%s\\n" {lines[-1].partition(" ")[2].partition(" ")[2].partition(" ")[2]}'
    done = subprocess.run(
        ["sh", "-c", shell],
        env={"SLURMD_NODENAME": "n1", **os.environ},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == ["/opt/n1/my python", "-u", "-m", "r1pipe.launch.batch", str(run.path)]


def test_a_job_is_followed_to_its_record(run: RunFolder, answers: Path) -> None:
    """Also while the scheduler does not answer."""
    assert slurm.submit(config(), run) == 17 and read_json(run.slurm) == {"job": 17}
    assert (answers / "asked").read_text().splitlines()[0] == f"sbatch --parsable {run.script}"
    assert slurm.job_of(run) == 17 and slurm.state(17)[0] == "UNREACHABLE"
    job = slurm.Submitted(config(), run, 17)
    threading.Timer(0.25, state, [answers, "PENDING", "Priority"]).start()
    threading.Timer(0.5, run.record.write_text, ["{}"]).start()
    job.follow()
    assert job.end() == 0


@pytest.mark.parametrize("how", ["FAILED", "unknown", "code"])
def test_a_job_that_is_over_without_a_record_is_told(
    run: RunFolder, answers: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "POLL_S", 0.0)
    write_json(run.slurm, {"job": 17} | ({"code": 143} if how == "code" else {}))
    state(answers, "FAILED")
    if how == "unknown":
        (answers / "bin" / "scontrol").write_text(UNKNOWN)
    job = slurm.Submitted(config(), run, 17)
    job.follow()
    code = job.end()
    told = failure(run, code)
    assert slurm.job_of(run) is None
    if how == "code":
        assert code == 143 and "was interrupted; the same command" in told
    else:
        state_told = "failed" if how == "FAILED" else "it does not know it"
        assert code == 1 and f"Slurm ended its job 17 ({state_told}; its log: " in told


def test_a_signal_lets_go_of_the_job(run: RunFolder, answers: Path) -> None:
    state(answers, "RUNNING")
    write_json(run.slurm, {"job": 17})
    job = slurm.Submitted(config(), run, 17)
    threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
    job.follow()
    code = job.end()
    assert code == 130 and "Slurm's job 17 goes on without this command" in failure(run, code)
    assert slurm.job_of(run) == 17 and "scancel" not in (answers / "asked").read_text()


def test_what_sbatch_refuses_is_one_line(run: RunFolder, answers: Path) -> None:
    (answers / "sbatch").unlink()
    with pytest.raises(EnvironmentProblem, match=r"sbatch refuses .*No such file") as problem:
        slurm.submit(config(), run)
    assert "\n" not in str(problem.value)


def test_a_restart_waits_for_a_machine_that_could_not_say_goodbye(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch.locks, "LEASE_S", 2.0)
    write_json(run.pid, {"host": "gone", "since": "then", "processes": [[7, 1.0], [8, 1.0]]})
    began = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(batch.time, "sleep", lambda seconds: pytest.fail("this is no restart"))
        batch.wait_for_lease(run)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    batch.wait_for_lease(run)
    batch.locks.check_not_running(run)
    assert time.monotonic() - began >= 2.0 - 0.1


def test_a_stage_is_submitted_once_and_then_found(
    house: House, answers: Path, capsys: pytest.CaptureFixture
) -> None:
    words = ["stage=base", f"root={house.root}", "tracking=none", "model=laptop", *WORDS]
    shown = pipeline.dry_run(compose(words).config, fresh=False)
    assert shown.startswith("#!/bin/sh") and not (answers / "asked").exists()
    state(answers, "RUNNING")
    for _ in range(2):
        plan = pipeline.plan_run(compose(words).config)
        threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT]).start()
        assert pipeline.run_stage(plan) == 130
    assert (answers / "asked").read_text().count("sbatch") == 1
    told = capsys.readouterr().err
    assert told.count("this command follows Slurm's job 17; Ctrl-C lets go of it") == 2
    changed = (Change("stage.save_every", 4, 3),)  # a running job cannot take it up
    with pytest.raises(EnvironmentProblem, match=r"is in Slurm's queue \(job 17\) with another config"):
        pipeline.submitted(replace(plan, changed=changed))
