"""A rank that is killed or stuck: named, with its place; all ranks end; the same command resumes."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from fake_ranks import SLOW_S
from forked import ranks as forked_ranks
from forked import wait_until
from jobs import OPTIM, ROUTER, engine_config, tiny, tiny_model, write_run
from rl_runs import go
from safetensors.torch import load_file
from tiny_runs import tiny_run
from watched import STUCK_AFTER_S, end_of, signals_here

from r1pipe.core.errors import ConfigError
from r1pipe.core.paths import RunFolder
from r1pipe.launch.watch import Watch
from r1pipe.runs import heartbeat, lineage, processes
from r1pipe.runs.stopping import Interrupted
from r1pipe.train.engine.engine import Engine
from r1pipe.train.loading import load_model
from r1pipe.train.rl import loop
from r1pipe.train.run import open_run


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_that_hangs_is_named_with_its_place(ranks, tmp_path):
    ended = end_of("hangs", tmp_path, ranks)
    assert ended.code == 1
    assert ended.line.startswith(f"run: rank {ranks - 1} stuck in update, step 3: no sign of work for ")
    assert ended.line.endswith("; the same command restarts it (no checkpoint yet)")
    assert "\n" not in ended.line
    stack = ended.run.stack(ranks - 1).read_text()
    assert "in hang" in stack and str(ended.run.stack(ranks - 1)) in ended.line


def test_a_rank_whose_process_is_stopped_is_named(tmp_path):
    ended = end_of("stopped", tmp_path, 2)
    assert ended.code == 1
    assert (
        "rank 1 stuck in update, step 3: its process" in ended.line and "is stopped (SIGSTOP)" in ended.line
    )


def test_ranks_that_wait_for_one_another_are_all_named(tmp_path):
    ended = end_of("two_collectives", tmp_path, 2)
    assert ended.code == 1
    assert "ranks 0, 1 stuck in" in ended.line and "all wait for one another" in ended.line


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_that_is_killed_is_named_with_the_signal(ranks, tmp_path):
    ended = end_of("killed", tmp_path, ranks)
    assert ended.code == 128 + signal.SIGKILL
    assert re.fullmatch(
        rf"run: rank {ranks - 1} was killed( by SIGKILL \(out of memory\?\))? in update, step 3; "
        r"all ranks were ended; the same command restarts it \(no checkpoint yet\)",
        ended.line,
    ), ended.line


@pytest.mark.parametrize("left", [False, True])
def test_the_signal_is_named_unless_the_rank_had_left_by_itself(left, tmp_path):
    """A parent that has not asked for the exit code yet, as DeepSpeed's launcher for up to a second."""
    run = RunFolder(tmp_path / "run")
    run.log.mkdir(parents=True)
    rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    beat = heartbeat.Beat(
        0,
        socket.gethostname(),
        rank.pid,
        processes.began(rank.pid),
        7,
        "sampling",
        exit_code=0 if left else None,
    )
    run.heartbeat(0).write_text(json.dumps(vars(beat)))
    looking = Watch(run, 1, stuck_after_s=3600)
    assert looking.check() is None
    rank.send_signal(signal.SIGSEGV)
    wait_until(lambda: not processes.is_alive(beat.pid, beat.began), "its end")
    fault = looking.check()
    if left:
        assert fault is None and looking.ended == {0: -signal.SIGSEGV}
    else:
        assert fault.code == 128 + signal.SIGSEGV
        assert fault.line.startswith(
            "run: rank 0 was killed by SIGSEGV in sampling, step 7; all ranks were ended"
        )
    rank.wait()


@pytest.mark.parametrize("code", [0, 2])
def test_a_rank_that_left_in_good_order_has_not_failed_though_its_launcher_has_reaped_it(code, tmp_path):
    """The command was stopped by Ctrl-Z meanwhile, and rank 0 still hashes the last checkpoint."""
    run = RunFolder(tmp_path / "run")
    run.log.mkdir(parents=True)
    rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    beat = heartbeat.Beat(1, socket.gethostname(), rank.pid, processes.began(rank.pid), exit_code=code)
    run.heartbeat(1).write_text(json.dumps(vars(beat)))
    rank.kill()
    rank.wait()
    watch = Watch(run, 2, stuck_after_s=3600)
    assert watch.check() is None and watch.exit_codes() == [code]
    assert (watch.failed_for_s() > 0) == (code != 0)


@pytest.mark.parametrize(
    ("error", "code"),
    [(None, 0), (Interrupted(15), 143), (ConfigError("x"), 2), (OSError(28, "full"), 2), (KeyError("x"), 1)],
)
def test_a_rank_leaves_its_exit_code_in_its_heartbeat(error, code, tmp_path):
    run = RunFolder(tmp_path / "run")
    with suppress(Exception), heartbeat.beating(run, 0):
        if error:
            raise error
    assert heartbeat.read(run.heartbeat(0)).exit_code == code


def test_a_rank_that_fails_by_itself_takes_the_others_along(tmp_path, monkeypatch):
    monkeypatch.setattr("r1pipe.launch.job.ENDING_S", 1.0)
    ended = end_of("crashes", tmp_path, 2)
    assert ended.code == 1
    assert "RuntimeError: a tensor has the wrong shape" in ended.line and "was killed" not in ended.line


def test_a_long_piece_of_work_that_says_so_is_not_stuck_and_ends_with_the_grace(tmp_path, monkeypatch):
    """It outlasts stuck_after_s; then it is asked to stop, which it does not hear."""
    monkeypatch.setattr("r1pipe.launch.watch.PATIENCE", 1000)
    ask = signals_here(signal.SIGTERM, after_s=1.5 * STUCK_AFTER_S)
    ended = end_of("hangs_in_a_compiler", tmp_path, 2, "engine.grace_s=1", act=ask)
    assert ended.code == 143
    assert "run was interrupted, did not leave within engine.grace_s=1 and was ended" in ended.line


def test_saving_shows_work_and_a_save_that_hangs_is_named_without_more_patience(tmp_path):
    ended = end_of("hangs_while_saving", tmp_path, 2)
    assert ended.code == 1
    assert ended.line.startswith("run: rank 1 stuck in saving, step 3: no sign of work for ")
    (tmp_path / "slowly").mkdir()
    ended = end_of("saves_slowly", tmp_path / "slowly", 2)
    assert 2 * 8 * SLOW_S > STUCK_AFTER_S, "it saves for longer than a silent rank may take"
    assert "rank 1 stuck in after saving, step 3" in ended.line


def test_a_rank_without_a_core_is_not_stuck_however_long_it_takes(tmp_path):
    ended = end_of("starved", tmp_path, 2)
    assert float((ended.run.path / "took").read_text()) > STUCK_AFTER_S
    assert "rank 1 stuck in after it, step 3: no sign of work for" in ended.line


def test_seconds_without_a_core_do_not_count_as_silence(tmp_path, monkeypatch):
    run, clock = RunFolder(tmp_path / "run"), [1000.0]
    run.log.mkdir(parents=True)
    monkeypatch.setattr("r1pipe.launch.watch.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("r1pipe.launch.watch.collect_stacks", lambda run, beats: {})
    began = processes.began(os.getpid())
    beat = heartbeat.Beat(0, socket.gethostname(), os.getpid(), began, 2, "update", patient=False)
    watch = Watch(run, 1, stuck_after_s=10)

    def found(seconds: int, starved: float) -> str:
        """What is told in so many seconds, of each of which the rank had no core for a share."""
        for _ in range(seconds):
            run.heartbeat(0).write_text(json.dumps(vars(beat)))
            if fault := watch.check():
                return fault.line
            clock[0] += 1.01
            beat.starved_s += starved * 1.01
        return ""

    assert found(90, starved=0.9) == "", "9 of 90 seconds"
    assert "rank 0 stuck in update, step 2: no sign of work for 1" in found(5, starved=0.0)
    beat.ticks += 1
    assert found(9, starved=0.0) == "" != found(5, starved=0.0), "with the tick it began anew"


def test_a_heartbeat_notes_the_seconds_without_a_core_once_there_are_no_ticks(tmp_path, monkeypatch):
    run, waited = RunFolder(tmp_path), iter([5.0, 5.5, 6.5, 9.0, 9.25])
    run.log.mkdir(parents=True)
    monkeypatch.setattr(processes, "delays", lambda: {1: next(waited), 2: 0.0})
    heart = heartbeat.Heart(run.heartbeat(0), 0)
    seen = []
    for ticks in (1, 1, 1, 1, 2, 2, 2):
        heart.beat.ticks = ticks
        heart.show_ticks()
        seen.append(heartbeat.read(run.heartbeat(0)).starved_s)
    os.close(heart.file)
    assert seen == [0.0, 0.0, 0.5, 1.5, 1.5, 1.5, 1.75]


def test_a_checkpoint_is_saved_and_taken_up_without_patience(tmp_path, monkeypatch):
    """On a real engine: every file of it shows work, written, hashed or read."""
    seen, real = [], heartbeat.tick
    folder = write_run(tmp_path / "run", tiny("pretrain"))
    engine = Engine(tiny_model(), OPTIM, ROUTER, engine_config(1, 1), 10)

    def tick() -> None:
        beat = heartbeat._heart.beat if heartbeat._heart else None
        seen.append((beat.place, beat.patient) if beat else None)
        real()

    monkeypatch.setattr(heartbeat, "tick", tick)
    with open_run(folder) as run:
        heartbeat.at_step(1)
        run.log(1, {"train/loss": 1.0})
        place = run.save_checkpoint(engine, 1, {})
        run.saved()
        files = [path for path in place.rglob("*") if path.is_file()]
        assert seen.count(("saving", False)) >= 3 * len(files), "written, hashed, made durable"
        assert not any(patient for _, patient in filter(None, seen))
        parent = lineage.checkpoint_of_folder(place)
        seen.clear()
        load_model(run, parent)
        assert len(seen) > len(load_file(place / "model.safetensors"))
        assert set(seen) - {("between phases", False)} == {("loading weights", False)}
        seen.clear()
        run.resume(engine)
        assert len(seen) > len(files)


def test_a_rank_that_works_while_others_wait_for_it_does_not_count_as_waiting(tmp_path):
    with heartbeat.beating(RunFolder(tmp_path), 0):
        beat = heartbeat._heart.beat
        with heartbeat.waiting():
            with heartbeat.working():
                assert not beat.waiting
            assert beat.waiting
        with heartbeat.working():
            assert not beat.waiting
        assert not beat.waiting


# --- the launching side of a signal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_has_all_ranks_leave_with_a_checkpoint(number, tmp_path):
    ended = end_of("ok", tmp_path, 2, act=signals_here(number))
    assert ended.code == 128 + number
    [saved] = [int(path.name.removeprefix("step-")) for path in ended.run.checkpoints.glob("step-*")]
    assert ended.line == f"run was interrupted; the same command resumes from step {saved}"
    assert not ended.run.stop.exists() and not ended.run.pid.exists()


def test_the_same_signal_again_ends_the_job_at_once(tmp_path):
    def interrupt_twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        wait_until((tmp_path / "run" / "stop").exists, "the first signal's request")
        os.kill(os.getpid(), signal.SIGINT)

    ended = end_of("stays", tmp_path, 2, act=interrupt_twice)
    assert ended.code == 130
    assert ended.line == "run was interrupted; the same command restarts it (no checkpoint yet)"


# --- heartbeats


def test_a_heartbeat_says_where_a_rank_is(tmp_path):
    run = RunFolder(tmp_path)
    with heartbeat.beating(run, 3):
        heartbeat.at_step(7)
        with heartbeat.at("sampling"):
            for _ in range(10_000):
                heartbeat.tick()
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


@pytest.mark.slow
def test_a_verifier_that_hangs_is_named_on_real_ranks(tmp_path):
    folder = tiny_run(tmp_path / "run", "stage=grpo", "engine.ranks=2", "stage.sampling.max_tokens=8")
    with forked_ranks(folder, stuck_verifier, 2):
        run, found = RunFolder(folder), []
        wait_until(lambda: [beat.waiting for beat in heartbeat.read_all(run)] == [True, False], "the wait")
        looking = Watch(run, 2, stuck_after_s=10)
        wait_until(lambda: found.append(looking.check()) or found[-1], "the fault")
    assert found[-1].line.startswith("run: rank 1 stuck in reward, step 1 (r1pipe/train/rl/loop.py:"), found[
        -1
    ].line
    assert "in score): no sign of work for" in found[-1].line
