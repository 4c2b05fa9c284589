"""A machine's agent, which starts its ranks and ends them, and what the command makes of all agents."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from r1pipe.core.paths import RunFolder
from r1pipe.launch import machines
from r1pipe.launch.machines import Machines
from r1pipe.launch.watch import Watch
from r1pipe.runs import agents, locks, stopping
from r1pipe.runs.agents import Agent, Orders
from r1pipe.runs.files import write_json
from r1pipe.runs.heartbeat import Beat

LIMIT_S = 600.0
# Rank 1 does what FATE says; all have a child that outlives them, and say so in the run folder.
RANK = """
import os, subprocess, sys, time
rank, run = os.environ["RANK"], sys.argv[1]
child = subprocess.Popen(["sleep", "1000"])
with open(f"{run}/begun-{rank}.partial", "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
os.rename(file.name, f"{run}/begun-{rank}")
if rank == "1" and os.environ["FATE"] != "stay":
    exec(os.environ["FATE"])
time.sleep(1000)
"""


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    (tmp_path / "rank.py").write_text(RANK)
    run = RunFolder(tmp_path / "run")
    run.create()
    run.launch.write_text("4711")
    return run


def orders(run: RunFolder, fate: str = "stay", hosts: tuple[tuple[str, int], ...] = (("h1", 2),)) -> None:
    script = run.path.parent / "rank.py"
    Orders("4711", list(hosts), str(script), str(run.path), "127.0.0.1", 20000, {"FATE": fate}).write(run)


def agent(run: RunFolder, node: int = 0, token: str = "4711") -> "subprocess.Popen[str]":
    line = [sys.executable, "-m", "r1pipe.launch.agent", str(run.path), str(node), token]
    return subprocess.Popen(line, stderr=subprocess.PIPE, text=True)


def wait_until(true) -> None:
    ends_at = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < ends_at
        time.sleep(0.02)


def processes_of(run: RunFolder) -> list[psutil.Process]:
    """Two ranks and their children, once they have begun."""
    files = [run.path / "begun-0", run.path / "begun-1"]
    wait_until(lambda: all(file.exists() for file in files))
    return [psutil.Process(int(pid)) for file in files for pid in file.read_text().split()]


def all_gone(found: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(found, timeout=LIMIT_S)[1]


@pytest.mark.parametrize("how", ["stop", "taken", "over"])
def test_an_agent_ends_its_ranks_and_all_that_they_started(run, how):
    orders(run)
    started = agent(run)
    found = processes_of(run)
    if how == "stop":
        stopping.request(run.stop, signal.SIGTERM, at_once=True)
    elif how == "taken":
        run.launch.write_text("4712")
    else:
        locks.end_launch(run)
    assert started.wait(LIMIT_S) == 128 + signal.SIGTERM and all_gone(found)
    shown = agents.read_all(run)[0]
    assert sorted(shown.ended) == [(0, 143), (1, 143)] and shown.exit_code == 143, "no rank has failed"


@pytest.mark.parametrize(
    ("fate", "code"), [("os.kill(os.getpid(), 9)", -9), ("os.kill(os.getpid(), 6)", -6), ("sys.exit(3)", 3)]
)
def test_it_shows_first_which_rank_failed_and_how(run, fate, code):
    orders(run, fate)
    started = agent(run)
    assert started.wait(LIMIT_S) == (code if code > 0 else 128 - code)
    shown = agents.read_all(run)[0]
    assert shown.ended == [(1, code), (0, 143)] and shown.exit_code == started.returncode


def test_a_signal_asks_all_ranks_to_save_and_kills_none(run):
    orders(run)
    started = agent(run)
    found = processes_of(run)
    started.terminate()
    wait_until(run.stop.exists)
    assert not stopping.is_at_once(run.stop)
    time.sleep(1.0)
    assert started.poll() is None and all(process.is_running() for process in found)
    stopping.request(run.stop, signal.SIGTERM, at_once=True)
    assert started.wait(LIMIT_S) and all_gone(found)


def test_one_that_does_not_see_the_run_says_so(run, tmp_path):
    started = agent(RunFolder(tmp_path / "elsewhere"))
    said = started.communicate(timeout=LIMIT_S)[1]
    assert started.returncode == agents.NO_FOLDER_CODE
    assert said.strip().endswith(f"does not see the run folder {tmp_path / 'elsewhere'}")


def test_the_other_machines_ranks_meet_where_the_first_says(run):
    orders(run, "sys.exit(0)", hosts=(("h1", 1), ("h2", 1)))
    second = agent(run, node=1)
    time.sleep(1.0)
    assert not (run.path / "begun-1").exists(), "there is nobody to meet yet"
    Agent(0, "4711", address="127.0.0.1").show(run)
    assert second.wait(LIMIT_S) == 0
    (child,) = [int(word) for word in (run.path / "begun-1").read_text().split()[1:]]
    psutil.Process(child).kill()  # which a rank that has ended well may leave


SAYS = "pdsh@head: h2: ssh exited with exit code {}\n"
LOST = f"h2 was lost (its connection ended) with rank 1 in update, step 3{''}"
SHARED = "h2 does not see {}; root must be a folder on a file system that all machines share"


@pytest.mark.parametrize(
    ("log", "has_begun", "told", "code"),
    [
        (SAYS.format(255), True, LOST, 137),
        ("srun: error: h2: task 1: Exited with exit code 1\n", True, LOST, 137),
        (SAYS.format(agents.NO_FOLDER_CODE), False, SHARED, 2),
        (
            f"h2: bash: no such python\n{SAYS.format(127)}",
            False,
            "h2 can start no rank: bash: no such python",
            2,
        ),
        (f" h2: ssh: unknown host\n{SAYS.format(255)}", False, "h2 can start no rank: ssh: unknown host", 2),
        ("h2: all is well\n", True, None, 0),
    ],
)
def test_a_machine_that_is_gone_is_named(run, log, has_begun, told, code):
    orders(run, hosts=(("h1", 1), ("h2", 1)))
    Agent(0, "4711").show(run)
    if has_begun:
        Agent(1, "4711").show(run)
    run.launcher_log.write_text(f"$ an earlier command\n{SAYS.format(255)}$ pdsh\n{log}")
    found = Machines(run)
    found.look()
    loss = found.lost([Beat(1, "h2", 7, 0.0, step=3, place="update")])
    assert (loss and (loss.line, loss.code)) == (told and (told.format(run.path), code))
    if has_begun and loss:  # its end was no loss
        Agent(1, "4711", exit_code=1).show(run)
        found.look()
        assert found.lost([]) is None


def test_one_that_goes_without_a_word_is_named(run, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(machines.time, "monotonic", lambda: clock[0])
    orders(run, hosts=(("h1", 1), ("h2", 1)))
    found, first, second = Machines(run), Agent(0, "4711"), Agent(1, "4711")
    second.show(run)
    for _ in range(4):
        clock[0] += 0.4 * machines.LOST_AFTER_S
        first.beats += 1
        first.show(run)
        found.look()
    loss = found.lost([])
    assert loss and loss.line.startswith("h2 was lost (no sign of it for ") and loss.code == 137


def test_the_rank_that_was_killed_is_the_first_one_whatever_is_told_first(run, monkeypatch):
    """Rank 0 fails because rank 1 is gone; its machine says so earlier."""
    orders(run, hosts=(("h1", 1), ("h2", 1)))
    for rank, host in ((0, "h1"), (1, "h2")):
        beat = Beat(rank, host, 7, 0.0, step=3, place="update", exit_code=1 if rank == 0 else None)
        write_json(run.heartbeat(rank), vars(beat), indent=None)
    watch = Watch(run, 2, stuck_after_s=3600, machines=Machines(run))
    Agent(0, "4711", ended=[(0, 1)], exit_code=1).show(run)
    Agent(1, "4711").show(run)
    assert watch.check() is None
    Agent(1, "4711", ended=[(1, -9)], exit_code=137).show(run)
    assert watch.check() is None, "there may be more to come"
    fault = watch.final_check(1)
    assert fault and "rank 1 on h2 was killed by SIGKILL (out of memory?) in update, step 3" in fault.line
    assert fault.code == 137
