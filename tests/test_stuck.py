"""A rank that is killed or stuck: named, with its place; all ranks end; the same command goes on."""

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from forked import ranks as forked_ranks
from forked import wait_until
from rl_runs import go
from tiny_runs import tiny_config, tiny_run

from r1pipe import heartbeat, launch, machine, processes
from r1pipe.paths import RunFolder
from r1pipe.rl import loop
from r1pipe.watch import Watch

STUCK_S = 3


class Ended(NamedTuple):
    code: int
    line: str
    seconds: float  # from the fault on
    run: RunFolder


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    script = tmp_path / "deepspeed"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("fake_ranks.py")} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setattr(machine, "must_launch", lambda engine: str(script))


def start(tmp_path: Path, ranks: int, *words: str) -> launch.Job:
    settings = (
        f"engine.ranks={ranks}",
        f"engine.stuck_after_s={STUCK_S}",
        "tracking=none",
        f"root={tmp_path}",
    )
    return launch.Job(tiny_config("stage=pretrain", *settings, *words), RunFolder(tmp_path / "run"))


def ends(job: launch.Job) -> Ended:
    """How a job ended that had a fault, and that none of its processes is left."""
    began: list[float] = []

    def note() -> None:
        wait_until((job.run.path / "there").exists, "the fault")
        began.append(time.monotonic())

    watcher = threading.Thread(target=note)
    watcher.start()
    job.follow()
    seconds = time.monotonic() - began[0]
    watcher.join()
    family = processes.group(job.process.pid)
    code = job.end()
    _, left = psutil.wait_procs(family, timeout=10)
    assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]
    return Ended(code, launch.failure(job.run, code), seconds, job.run)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_that_hangs_is_named_with_its_place(ranks, launcher, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE", "hangs")
    ended = ends(start(tmp_path, ranks))
    assert ended.code == 1 and ended.seconds < 20
    assert ended.line.startswith(f"run: rank {ranks - 1} stuck in update, step 3: no sign of work for ")
    assert ended.line.endswith("; the same command goes on with it (no checkpoint yet)")
    assert "\n" not in ended.line
    stack = ended.run.stack(ranks - 1).read_text()
    assert "in hang" in stack and str(ended.run.stack(ranks - 1)) in ended.line


def test_a_rank_whose_process_is_stopped_is_named(launcher, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE", "stopped")
    ended = ends(start(tmp_path, 2))
    assert ended.code == 1 and ended.seconds < 20
    assert (
        "rank 1 stuck in update, step 3: its process" in ended.line and "is stopped (SIGSTOP)" in ended.line
    )


def test_ranks_that_wait_for_one_another_are_all_named(launcher, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE", "two_collectives")
    ended = ends(start(tmp_path, 2))
    assert ended.code == 1
    assert "ranks 0, 1 stuck in" in ended.line and "all wait for one another" in ended.line


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_that_is_killed_is_named_with_the_signal(ranks, launcher, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE", "killed")
    ended = ends(start(tmp_path, ranks))
    assert ended.code == 128 + signal.SIGKILL and ended.seconds < 20
    place = f"rank {ranks - 1} was killed by SIGKILL (out of memory?) in update, step 3"
    assert (
        ended.line
        == f"run: {place}; all ranks were ended; the same command goes on with it (no checkpoint yet)"
    )


def test_a_rank_that_fails_by_itself_takes_the_others_along(launcher, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE", "crashes")
    monkeypatch.setattr(launch, "ENDING_S", 1.0)
    ended = ends(start(tmp_path, 2))
    assert ended.code == 1 and ended.seconds < 20
    assert "RuntimeError: a tensor has the wrong shape" in ended.line and "was killed" not in ended.line


def test_a_long_piece_of_work_that_says_so_is_not_stuck(launcher, tmp_path, monkeypatch):
    """For as long as patience lasts; the second half of the test is over at once."""
    monkeypatch.setenv("FAKE", "hangs_while_saving")
    job = start(tmp_path, 2, "engine.stuck_after_s=2")
    threading.Thread(target=signal_after, args=(job, 6.0, signal.SIGTERM)).start()
    monkeypatch.setattr(job.engine, "grace_s", 1.0)
    ended = ends(job)
    assert ended.code == 143
    assert "was interrupted, did not leave within engine.grace_s=1 and was ended" in ended.line


def signal_after(job: launch.Job, seconds: float, *numbers: int) -> None:
    wait_until((job.run.path / "there").exists, "the job to begin")
    for number in numbers:
        time.sleep(seconds)
        os.kill(os.getpid(), number)


# --- the launching side of a signal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_has_all_ranks_leave_with_a_checkpoint(number, launcher, tmp_path):
    job = start(tmp_path, 2)
    threading.Thread(target=signal_after, args=(job, 0.3, number)).start()
    ended = ends(job)
    assert ended.code == 128 + number
    [saved] = [int(path.name[5:]) for path in (ended.run.checkpoints).glob("step-*")]
    assert ended.line == f"run was interrupted; the same command goes on from step {saved}"
    assert not ended.run.stop.exists() and not ended.run.pid.exists()


def test_the_same_signal_again_ends_the_job_at_once(launcher, tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE", "stays")
    job = start(tmp_path, 2)
    threading.Thread(target=signal_after, args=(job, 0.5, signal.SIGINT, signal.SIGINT)).start()
    ended = ends(job)
    assert ended.code == 130 and ended.seconds < 10
    assert ended.line == "run was interrupted; the same command goes on with it (no checkpoint yet)"


# --- heartbeats


def test_a_heartbeat_says_where_a_rank_is_and_costs_next_to_nothing(tmp_path):
    run = RunFolder(tmp_path)
    with heartbeat.beating(run, 3):
        heartbeat.at_step(7)
        with heartbeat.at("sampling"):
            began = time.perf_counter()
            for _ in range(10_000):
                heartbeat.tick()
            assert (time.perf_counter() - began) / 10_000 < 20e-6, "seconds a tick"
            wait_until(lambda: (heartbeat.read(run.heartbeat(3)) or beat).ticks >= 10_000, "it is written")
            beat = heartbeat.read(run.heartbeat(3))
            assert (beat.rank, beat.pid, beat.where()) == (3, os.getpid(), "sampling, step 7")
            assert not beat.waiting and not beat.patient
            with heartbeat.at("saving", patient=True), heartbeat.waiting():
                assert heartbeat._heart.beat.patient and heartbeat._heart.beat.waiting
        assert heartbeat._heart.beat.place == "between phases" and not heartbeat._heart.beat.waiting
    heartbeat.tick()  # outside a job nothing happens
    run.heartbeat(3).write_text('{"rank": 3')
    assert heartbeat.read(run.heartbeat(3)) is None and heartbeat.read_all(run) == []


# --- real ranks


def stuck_verifier(folder: Path) -> None:
    """Reinforcement in which the verifier of rank 1 never comes back."""
    if os.environ["RANK"] == "1":
        loop.score_groups = never  # type: ignore[assignment]
    go(folder)


def never(*arguments: object, **settings: object) -> None:
    while True:
        time.sleep(0.1)


def test_a_verifier_that_hangs_is_named_on_real_ranks(tmp_path):
    folder = tiny_run(tmp_path / "run", "stage=grpo", "engine.ranks=2", "stage.sampling.max_tokens=8")
    with forked_ranks(folder, stuck_verifier, 2):
        watch = Watch(RunFolder(folder), 2, stuck_after_s=10)
        found = []
        wait_until(lambda: found.append(watch.look()) or found[-1], "the fault")
    assert found[-1].line.startswith("run: rank 1 stuck in reward, step 1 (r1pipe/rl/loop.py:"), found[
        -1
    ].line
    assert "in score): no sign of work for" in found[-1].line
