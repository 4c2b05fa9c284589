"""A job whose command was killed, or that a second terminal asks for: the same command follows it."""

import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from fakes import House
from forked import wait_until
from watched import ends, fake_launcher, signals_here, start

from r1pipe.config import read_config
from r1pipe.core.paths import RunFolder
from r1pipe.launch import job, pipeline
from r1pipe.launch.run_plan import Action
from r1pipe.runs import locks, processes

WORDS = ("run", "stage=pretrain")


@pytest.fixture
def command() -> Iterator[Callable[..., BaseProcess]]:
    """Runs a function in a process of its own, which has what the test has patched."""
    started: list[BaseProcess] = []

    def run(function: Callable[..., int], *arguments: object) -> BaseProcess:
        started.append(
            multiprocessing.get_context("fork").Process(target=lambda: sys.exit(function(*arguments)))
        )
        started[-1].start()
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.join()


@pytest.fixture
def mirrored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file with a line for each run that was brought to MLflow whole: by which process."""
    told = tmp_path / "mirrored"
    told.touch()

    class Mirror:
        def __init__(self, folder: Path, config: dict) -> None:
            self.folder = folder

        def poll(self) -> None:
            pass

        def finish(self) -> None:
            with told.open("a") as file:
                file.write(f"{self.folder.name} {os.getpid()}\n")

    monkeypatch.setattr(job, "Mirror", Mirror)
    return told


def running(house: House) -> RunFolder:
    """The run that waits to be let go."""
    wait_until(lambda: list(house.root.glob("*/waiting")), "the job")
    return RunFolder(next(house.root.glob("*/waiting")).parent)


def let_go(house: House, ready: Callable[[], object]) -> threading.Thread:
    """Lets the job end once `ready`."""

    def act() -> None:
        wait_until(ready, "the command")
        (house.root / "go").touch()

    thread = threading.Thread(target=act)
    thread.start()
    return thread


def owner_of(run: RunFolder) -> int:
    holder = locks.Holder.read(run.pid)
    return holder.processes[0][0] if holder.processes else 0


def test_the_same_command_takes_the_place_of_one_that_was_killed(
    house, command, mirrored, monkeypatch, capfd
):
    monkeypatch.setenv("FAKE", "wait")
    first = command(house.call, *WORDS)
    run = running(house)
    first.kill()
    first.join()
    capfd.readouterr()
    letting = let_go(house, lambda: owner_of(run) == os.getpid())
    assert house.call(*WORDS) == 0
    letting.join()
    out, err = capfd.readouterr()
    assert f"{run.run_id}: is already running (process " in err and "this one takes over" in err
    assert f"run folder: {run.path}" in out
    assert (run.path / "begun").read_text().count("\n") == 1, "one job did it"
    assert mirrored.read_text() == f"{run.run_id} {os.getpid()}\n" and not run.pid.exists()


def test_a_second_terminal_follows_beside_the_owner(house, command, mirrored, monkeypatch, capfd):
    monkeypatch.setenv("FAKE", "wait")
    first = command(house.call, *WORDS)
    run = running(house)
    capfd.readouterr()
    attached: list[str] = []

    def is_attached() -> bool:
        attached.append(capfd.readouterr().err)
        return "this one follows it, too" in "".join(attached)

    letting = let_go(house, is_attached)
    assert house.call(*WORDS) == 0
    letting.join()
    first.join()
    assert first.exitcode == 0 and mirrored.read_text() == f"{run.run_id} {first.pid}\n"
    assert (run.path / "begun").read_text().count("\n") == 1
    assert pipeline.plan_run(read_config(run.config), fresh=True).action is Action.START


def test_one_that_follows_takes_over_when_the_owner_is_killed(house, command, mirrored, monkeypatch):
    monkeypatch.setenv("FAKE", "wait")
    first = command(house.call, *WORDS)
    run = running(house)
    second = command(house.call, *WORDS)
    wait_until(lambda: not first.is_alive() or second.is_alive(), "the second")
    first.kill()
    first.join()
    wait_until(lambda: owner_of(run) == second.pid, "the takeover")
    (house.root / "go").touch()
    second.join()
    assert second.exitcode == 0 and mirrored.read_text() == f"{run.run_id} {second.pid}\n"


def test_a_reproduction_that_was_killed_is_continued_from_the_running_job(
    house, command, mirrored, monkeypatch, capfd
):
    monkeypatch.setenv("FAKE", "wait")
    first = command(house.call, "reproduce", "recipe=laptop")
    run = running(house)
    first.kill()
    first.join()
    letting = let_go(house, lambda: owner_of(run) == os.getpid())
    assert house.call("reproduce", "recipe=laptop") == 0
    letting.join()
    assert (run.path / "begun").read_text().count("\n") == 1
    stages = {json.loads((path / "record.json").read_text())["stage"] for path in house.runs()}
    assert {"base", "all_scenario", "control_sft"} <= stages
    assert "report.html" in capfd.readouterr().out


def start_and_wait(folder: Path) -> int:
    """A command that has started its job, and is then killed."""
    started = start(folder, "stage=pretrain", "engine.ranks=2")
    started.follow()
    return started.end()


@pytest.mark.parametrize(
    ("how", "number", "code", "with_launcher"),
    [
        ("ok", signal.SIGTERM, 143, True),
        ("ok", signal.SIGINT, 130, True),
        ("ok", signal.SIGTERM, 143, False),
        ("crashes", 0, 1, True),
    ],
)
def test_signals_and_the_exit_code_are_those_of_the_job(how, number, code, with_launcher, tmp_path, command):
    with fake_launcher(tmp_path, how):
        run = RunFolder(tmp_path / "run")
        first = command(start_and_wait, tmp_path)
        wait_until(lambda: (run.path / "there").exists() and locks.job_of(run), "the job")
        first.kill()
        first.join()
        holder = locks.job_of(run)
        if holder is None:
            assert how == "crashes", "it was quicker than we"
            return
        if not with_launcher:
            os.kill(holder.processes[1][0], signal.SIGKILL)
            wait_until(lambda: not processes.is_alive(*holder.processes[1]), "the launcher's end")
        attached = job.Job(read_config(run.config), run)
        attached.attach(holder)
        assert attached.is_owner
        ended = ends(attached, lambda: True, signals_here(number) if number else lambda: None)
    assert ended.code == code
    if number:
        assert "was interrupted; the same command resumes from step" in ended.line
    assert not run.pid.exists()
