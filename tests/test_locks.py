"""One job at a time on a run folder: who has it is told, and what the dead leave is taken over."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from faults.locks import launchers_killed
from forked import wait_until
from jobs import tiny, write_run

from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.paths import RunFolder
from r1pipe.runs import heartbeat, locks, processes
from r1pipe.train.run import open_run

TAKES = """
import sys, time
from pathlib import Path
from r1pipe.runs import locks
from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.paths import RunFolder
run = RunFolder(sys.argv[1])
while not (run.path.parent / "go").exists():
    pass
try:
    with locks.held(run):
        print("has it", flush=True)
        time.sleep(3600)
except EnvironmentProblem as error:
    print(error, flush=True)
"""
BEATS = """
import sys, time
from r1pipe.runs import heartbeat
from r1pipe.core.paths import RunFolder
with heartbeat.beating(RunFolder(sys.argv[1]), 0):
    time.sleep(3600)
"""
# A rank on another machine, whose launcher here was killed: once told to, it finishes a checkpoint.
ORPHAN = """
import socket, sys, time
from pathlib import Path
socket.gethostname = lambda: "node8"
from r1pipe.runs import checkpoints, locks
from r1pipe.train.run import open_run
locks.LOOK_S = float(sys.argv[2])
with open_run(sys.argv[1]) as run:
    (checkpoints.begin(run.folder.checkpoint(1)) / "weights").touch()
    print("begun", flush=True)
    while not (run.folder.path / "go").exists():
        time.sleep(0.05)
    checkpoints.finish(run.folder.checkpoint(1), run.launch.saving())
"""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    found = RunFolder(tmp_path / "grpo-s0")
    found.log.mkdir(parents=True)
    return found


@pytest.fixture
def started():
    """Starts Python programs, and ends those that are left."""
    programs: list[subprocess.Popen[str]] = []

    def start(text: str, run: RunFolder, *words: str, **variables: str) -> subprocess.Popen[str]:
        line = [sys.executable, "-c", text, str(run.path), *words]
        environment = os.environ | variables
        programs.append(subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True))
        return programs[-1]

    yield start
    for program in programs:
        program.kill()
        program.communicate()


def test_of_four_that_start_in_the_same_moment_one_has_it(run, started):
    programs = [started(TAKES, run) for _ in range(4)]
    time.sleep(1)
    (run.path.parent / "go").touch()
    lines = [program.stdout.readline() for program in programs]
    assert lines.count("has it\n") == 1, lines
    [holder] = [program for program, line in zip(programs, lines, strict=True) if line == "has it\n"]
    told = (
        rf"run grpo-s0 is already running \(process {holder.pid} on {socket.gethostname()} since 20..-..-.. "
    )
    assert sum(bool(re.match(told, line)) for line in lines) == 3, lines

    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with locks.held(run):  # what it left is taken over
        assert locks.Holder.read(run.pid).processes[0][0] == os.getpid()
    assert not run.pid.exists()


@pytest.mark.parametrize(
    "content",
    ["", "4711", "{", "[]", '{"host": 3}', "\x00\xff", '{"host": "a", "since": "b", "processes": [[1]]}'],
)
def test_a_garbled_pid_file_stops_nobody(run, content):
    run.pid.write_bytes(content.encode("latin-1"))
    with locks.held(run):
        assert json.loads(run.pid.read_text())["host"] == socket.gethostname()


def test_a_number_that_is_another_process_now_stops_nobody(run):
    locks.Holder(socket.gethostname(), "long ago", [(os.getpid(), 1.0), (os.getppid(), 2.0)]).write(run.pid)
    locks.check_not_running(run)


def test_each_process_of_a_job_holds_it(run, started):
    """The launcher may outlive the command line that started it."""
    launcher = started("import time; time.sleep(3600)", run)
    with locks.held(run) as lock:
        lock.add(launcher.pid)
        kept = run.pid.read_bytes()
    holder = json.loads(kept)
    holder["processes"][0][1] = 1.0  # the command line is gone
    run.pid.write_text(json.dumps(holder))
    with pytest.raises(EnvironmentProblem, match=rf"already running \(process {launcher.pid} on "):
        locks.check_not_running(run)
    launcher.kill()
    launcher.wait()
    locks.check_not_running(run)


@pytest.mark.parametrize("garbled", [False, True])
def test_ranks_that_outlive_their_launcher_hold_it_too(run, started, garbled):
    rank = started(BEATS, run)
    wait_until(lambda: heartbeat.read_all(run), "the heartbeat")
    text = (
        "?"
        if garbled
        else json.dumps({"host": socket.gethostname(), "since": "x", "processes": [[2**22, 1.0]]})
    )
    run.pid.write_text(text)
    with pytest.raises(EnvironmentProblem, match=rf"ranks whose launcher is gone .*kill -9 {rank.pid}$"):
        locks.check_not_running(run)
    rank.kill()
    rank.wait()
    with locks.held(run):
        assert heartbeat.read_all(run) == [], "those of the session before are forgotten"


def test_a_rank_without_launchers_holds_it_before_its_first_heartbeat(tmp_path):
    """r1pipe and the runner were killed while the rank was still importing."""
    with launchers_killed(tmp_path) as (run, rank):
        with pytest.raises(EnvironmentProblem, match=rf"launcher is gone .*: kill -9 {rank.pid}$"):
            locks.check_not_running(run)
        other = RunFolder(tmp_path / "another-run")
        other.path.mkdir()
        other.pid.write_bytes(run.pid.read_bytes())
        locks.check_not_running(other)  # whose the group's number is shows in the words of its processes
    locks.check_not_running(run)


def test_a_rank_whose_run_was_taken_over_refuses_to_begin_and_writes_nothing(tmp_path, started, caplog):
    """Its launcher was killed before the lock could name it, so that nothing held off the other job."""
    run = RunFolder(write_run(tmp_path / "pretrain-s0", tiny("pretrain")))
    runner = started("import time; time.sleep(3600)", run)
    holder = locks.Holder(socket.gethostname(), "now", [(runner.pid, processes.began(runner.pid))])
    holder.write(run.pid)
    with pytest.raises(SystemExit) as left, open_run(run.path):
        pytest.fail("it has begun")
    assert left.value.code == 2 and not run.error.exists() and not heartbeat.read_all(run)
    assert f"is another job's (process {runner.pid} on" in caplog.text
    holder.processes.append((os.getpgrp(), 1.0))  # the runner that leads this process's group
    holder.write(run.pid)
    with open_run(run.path):
        assert heartbeat.read_all(run)


@pytest.mark.parametrize(("looks_every_s", "is_taken"), [("0.1", True), ("3600", True), ("0.1", False)])
def test_a_rank_elsewhere_saves_nothing_once_another_launch_has_the_run(
    tmp_path, started, looks_every_s, is_taken
):
    """It leaves by itself; if the launch comes while it saves, the checkpoint does not count."""
    run = RunFolder(write_run(tmp_path / "pretrain-s0", tiny("pretrain")))
    with locks.held(run):
        token = run.launch.read_text()
    rank = started(ORPHAN, run, looks_every_s, **{locks.LAUNCH: token})
    assert "begun\n" in (rank.stdout.readline(), rank.stdout.readline())
    if not is_taken:
        (run.path / "go").touch()
        assert rank.wait() == 0 and run.checkpoint(1).is_dir()
        return
    with locks.held(run):  # no process of this machine has it
        assert run.launch.read_text() != token
        if looks_every_s == "3600":
            (run.path / "go").touch()
        told = rank.stdout.read().strip().splitlines()[-1]
    assert rank.wait() == 2
    assert f"is another job's (process {os.getpid()} on {socket.gethostname()} since 20" in told
    assert told.endswith("; this rank, whose launcher is gone, leaves it alone")
    assert not run.checkpoint(1).exists() and not run.error.exists()


def test_a_rank_of_an_earlier_launch_refuses_to_begin(tmp_path, monkeypatch, caplog):
    run = RunFolder(write_run(tmp_path / "pretrain-s0", tiny("pretrain")))
    with locks.held(run):
        monkeypatch.setenv(locks.LAUNCH, run.launch.read_text())
    with open_run(run.path):
        assert heartbeat.read_all(run)
    run.heartbeat(0).unlink()
    with locks.held(run):
        pass  # another launch, which has ended: nobody has the run
    with pytest.raises(SystemExit) as left, open_run(run.path):
        pytest.fail("it has begun")
    assert left.value.code == 2 and not run.error.exists() and not heartbeat.read_all(run)
    assert "is another job's; this rank" in caplog.text


def test_a_job_on_another_machine_holds_it_while_it_shows_life(run, monkeypatch):
    locks.Holder("node7", "2026-11-25 03:56:34", [(4711, 1.0)]).write(run.pid)
    with pytest.raises(
        EnvironmentProblem, match=r"process 4711 on node7 since 2026-11-25 03:56:34\).*again in \d+ s"
    ):
        locks.check_not_running(run)
    monkeypatch.setattr(locks, "LEASE_S", 1e6)
    old = time.time() - 2e6
    os.utime(run.pid, (old, old))
    locks.check_not_running(run)
    beat = heartbeat.Beat(0, "node8", psutil.Process().pid, 1.0)
    run.heartbeat(0).write_text(json.dumps(vars(beat)))  # a rank on a third machine
    with pytest.raises(EnvironmentProblem, match="on node7"):
        locks.check_not_running(run)
    os.utime(run.heartbeat(0), (old, old))
    locks.check_not_running(run)


def test_a_lock_that_another_has_taken_over_is_left_alone(run):
    with locks.held(run):
        locks.Holder("node7", "now", [(4711, 1.0)]).write(run.pid)
    assert locks.Holder.read(run.pid).host == "node7"


def test_the_holder_shows_life(run, monkeypatch):
    monkeypatch.setattr(locks, "RENEW_S", 0.0)
    with locks.held(run) as lock:
        os.utime(run.pid, (1.0, 1.0))
        lock.renew()
        assert run.pid.stat().st_mtime > 1.0
