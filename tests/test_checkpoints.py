"""Checkpoints: whole or not there, durable, finished beside training; damage is found and stepped over."""

import json
import logging
import os
import pickle
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from jobs import OPTIM, ROUTER, engine_config, tiny, tiny_model, write_run
from rl_runs import go, metrics_of
from tiny_runs import tiny_run

from r1pipe.core.errors import CheckpointError, ConfigError, EnvironmentProblem, disk_is_full
from r1pipe.core.paths import RunFolder
from r1pipe.runs import checkpoints, retention
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.run import open_run
from r1pipe.train.saving import raise_in_all_ranks


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path / "run", tiny("pretrain", "stage.keep=2"))


@pytest.fixture
def engine():
    return Engine(tiny_model(), OPTIM, ROUTER, engine_config(), 10)


def save(run, engine, *steps: int) -> None:
    for step in steps:
        run.log(step, {"train/loss": float(step)})
        run.save_checkpoint(engine, step, {"cursor": step})


def finished(folder: Path, *steps: int) -> Path:
    """Small whole checkpoints; the folder that holds them."""
    for step in steps:
        with checkpoints.whole(folder / f"step-{step}") as temporary:
            (temporary / "model.safetensors").write_text(f"weights {step}")
            (temporary / checkpoints.ENGINE).mkdir()
            (temporary / checkpoints.ENGINE / "state.pt").write_text(f"moments {step}")
    return folder


# --- whole and durable


def test_files_and_folders_are_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    done = []
    real_rename = Path.rename
    monkeypatch.setattr(checkpoints, "sync", lambda path: done.append(path.relative_to(tmp_path).as_posix()))
    monkeypatch.setattr(Path, "rename", lambda path, to: (done.append("rename"), real_rename(path, to)))
    finished(tmp_path, 1)
    inside = ".step-1.unfinished"
    before, after = done[: done.index("rename")], done[done.index("rename") + 1 :]
    expected = ["", "/manifest.json", "/model.safetensors", "/engine", "/engine/state.pt"]
    assert sorted(before) == sorted(inside + name for name in expected)
    assert after == ["."]


def test_a_checkpoint_is_finished_while_training_goes_on(folder, engine, monkeypatch):
    """The step after a save does not wait for it; the next save, and the end, do."""
    go_on, real = threading.Event(), checkpoints.finish
    monkeypatch.setattr(checkpoints, "finish", lambda *given: (go_on.wait(1800), real(*given)))
    with open_run(folder) as run:
        save(run, engine, 1)
        assert checkpoints.steps(run.folder.checkpoints) == []
        assert threading.current_thread() is threading.main_thread()
        go_on.set()
        save(run, engine, 2)
        assert 1 in checkpoints.steps(run.folder.checkpoints)
    assert checkpoints.steps(folder / "checkpoints") == [1, 2]
    assert run.seconds["saving"] > 0


def test_what_goes_wrong_in_the_thread_comes_out(folder, engine, monkeypatch):
    monkeypatch.setattr(checkpoints, "finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), open_run(folder) as run:
        save(run, engine, 1)


def test_an_error_of_the_job_still_waits_for_the_checkpoint(folder, engine):
    with pytest.raises(ZeroDivisionError), open_run(folder) as run:
        save(run, engine, 1)
        _ = 1 / 0
    assert checkpoints.steps(folder / "checkpoints") == [1]


# --- damage


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGES = [flip, truncate, Path.unlink]
FILES = ["model.safetensors", "engine/state/mp_rank_00_model_states.pt", "manifest.json"]


@pytest.mark.parametrize("damage", DAMAGES, ids=["flip", "truncate", "unlink"])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(folder, engine, damage, file, caplog):
    with open_run(folder) as run:
        save(run, engine, 1, 2, 3)
        run.log(4, {"train/loss": 4.0})
        run.folder.rollouts.mkdir()
        for step in (1, 2, 3, 4):
            (run.folder.rollouts / f"step-{step}.parquet").touch()
    damage(folder / "checkpoints" / "step-3" / file)
    if file == "manifest.json" and damage is flip:
        assert (folder / "checkpoints" / "step-3" / file).read_bytes()  # any bit of it counts
    with open_run(folder) as run:
        assert run.resume(engine) == (2, {"cursor": 2})
        warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
        [told] = [line for line in warnings if "step-3" in line]
        assert file.rpartition("/")[2] in told or file == "manifest.json"
        assert told.endswith("resumes from step 2 instead")
        assert [row["step"] for row in run.logged()] == [1, 2]
        assert sorted(path.stem for path in run.folder.rollouts.iterdir()) == ["step-1", "step-2"]
        save(run, engine, 3)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-2", "step-3"]
    checkpoints.verify(folder / "checkpoints" / "step-3", engine=True)


def test_without_a_whole_checkpoint_the_run_is_refused_with_the_remedy(folder, engine):
    with open_run(folder) as run:
        save(run, engine, 1, 2)
    for path in (folder / "checkpoints").glob("step-*"):
        flip(path / "model.safetensors")
    with pytest.raises(SystemExit) as left, open_run(folder) as run:
        run.resume(engine)
    assert left.value.code == 2
    told = (folder / "error.txt").read_text()
    assert told.count("\n") == 1 and "none of the 2 checkpoints" in told and "step-2/model" in told
    assert "--fresh" in told
    assert len(list((folder / "checkpoints").glob("step-*"))) == 2  # left as they are, to be looked at


@pytest.mark.parametrize("level", [1, 2])  # as it was written, and brought from another level
def test_code_in_a_whole_checkpoint_is_not_run_and_the_run_is_refused_in_one_line(folder, level):
    engine = Engine(tiny_model(), OPTIM, ROUTER, engine_config(1, 1), 10)
    with open_run(folder) as run:
        save(run, engine, 1, 2)
    newest = folder / "checkpoints" / "step-2"
    [state] = (newest / "engine" / "state").glob("*_optim_states.pt")
    state.write_bytes(pickle.dumps(Path("/"), 2))
    checkpoints.write_manifest(newest)  # by somebody who knows how
    if level != 1:
        engine = Engine(tiny_model(), OPTIM, ROUTER, engine_config(1, level), 10)
    with pytest.raises(SystemExit) as left, open_run(folder) as run:
        run.resume(engine)
    told = (folder / "error.txt").read_text()
    assert left.value.code == 2 and told.count("\n") == 1
    assert str(state) in told and "it contains pathlib" in told and "remove this checkpoint" in told
    shutil.rmtree(newest)
    with open_run(folder) as run:
        assert run.resume(engine)[0] == 1


def test_a_run_that_never_saved_starts_from_its_beginning(folder):
    (folder / "checkpoints" / ".step-1.unfinished").mkdir(parents=True)
    with open_run(folder) as run:
        assert run.newest_complete(Ranks(engine_config())) is None


@pytest.mark.parametrize("name", ["../../secret", "/etc/hostname", "engine/../../x"])
def test_a_manifest_cannot_name_what_lies_elsewhere(tmp_path, name):
    finished(tmp_path, 1)
    (tmp_path / "step-1" / "manifest.json").write_text(json.dumps({"files": {name: "0" * 64}}))
    with pytest.raises(CheckpointError, match="is not a file of"):
        checkpoints.verify(tmp_path / "step-1")


LINES = ['{"step": 1, "a": 1.0}\n', '{"step": 2, "a": 2.0}\n', '{"step": 3, "a": 3.0}\n']


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "metrics.jsonl is missing"),
        (b"", "line 1 must be step 1 of the 3"),
        ("".join(LINES[:2]), "line 3 must be step 3 of the 3"),
        ("".join(LINES)[:-1], "line 3 must be step 3 of the 3"),
        ("".join(LINES[1:]), "line 1 must be step 1 of the 3"),
        ("".join([LINES[0], *LINES]), "line 2 must be step 2 of the 3"),
        ("".join(LINES).encode().replace(b"2.0", b"2\xff0"), "metrics.jsonl line 2 is not JSON"),
        ("".join(LINES).replace("2.0", '"2"'), "metrics.jsonl line 2 does not hold a step and its numbers"),
        ("[1]\n" + "".join(LINES), "metrics.jsonl line 1 does not hold a step"),
    ],
)
def test_a_run_with_damaged_metrics_is_refused_with_the_remedy(folder, engine, content, told):
    with open_run(folder) as run:
        save(run, engine, 1, 2, 3)
    if content is None:
        run.folder.metrics.unlink()
    else:
        run.folder.metrics.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as left, open_run(folder) as run:
        run.resume(engine)
    line = run.folder.error.read_text()
    assert left.value.code == 2 and line.count("\n") == 1 and str(run.folder.metrics) in line
    assert told in line and line.endswith("or start the stage anew (--fresh)\n")


def test_damaged_metrics_name_their_line_where_the_best_checkpoint_is_looked_for(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(LINES[0].encode() + b'{"step": 2, "a": \xff}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl line 2 is not JSON"):
        retention.best(tmp_path / "metrics.jsonl", {1, 2}, "a", "max")


def test_reinforcement_ends_with_the_same_bits_after_damage(tmp_path):
    """Six steps in one go, and six of which the newest checkpoint broke after an interruption at four."""
    settings = ("stage=grpo", "stage.save_every=2", "stage.keep=3")
    go(tiny_run(tmp_path / "whole", *settings, "stage.max_steps=6"))
    folder = tiny_run(tmp_path / "broken", *settings, "stage.max_steps=6")
    go(folder)
    (folder / "record.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step-6")  # as if the job had been killed before
    flip(folder / "checkpoints" / "step-4" / "engine" / "state" / "mp_rank_00_model_states.pt")
    go(folder)
    weights = [path / "checkpoints" / "step-6" / "model.safetensors" for path in (tmp_path / "whole", folder)]
    assert checkpoints.file_hash(weights[0]) == checkpoints.file_hash(weights[1])
    assert metrics_of(folder) == metrics_of(tmp_path / "whole")
    tables = [sorted(p.name for p in (f / "rollouts").iterdir()) for f in (tmp_path / "whole", folder)]
    assert tables[0] == tables[1] and len(tables[0]) == 6


# --- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB; skipped where none can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)], check=False)
    if mounted.returncode:
        pytest.skip("mounting a small file system takes root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path, leave: int) -> Path:
    """A file that leaves so many bytes free."""
    ballast = place / "ballast"
    ballast.write_bytes(bytes(shutil.disk_usage(place).free - leave))
    return ballast


@pytest.mark.parametrize("leave", [2**16, 2**19])  # too little for the weights, and for the state behind them
def test_a_full_disk_keeps_the_last_checkpoint_and_is_one_line(small_disk, engine, leave):
    folder = write_run(small_disk / "run", tiny("pretrain"))
    with open_run(folder) as run:
        save(run, engine, 1)
    ballast = fill(small_disk, leave)
    with pytest.raises(SystemExit) as left, open_run(folder) as run:
        run.resume(engine)
        save(run, engine, 2)
    assert left.value.code == 2
    told = (folder / "error.txt").read_text()
    assert told.count("\n") == 1 and "is full" in told and "resumes from the last checkpoint" in told
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-1"]
    ballast.unlink()
    with open_run(folder) as run:
        assert run.resume(engine) == (1, {"cursor": 1})
        save(run, engine, 2)
    checkpoints.verify(folder / "checkpoints" / "step-2", engine=True)


def test_a_full_disk_under_the_metrics_is_one_line(small_disk):
    folder = write_run(small_disk / "run", tiny("pretrain"))
    with pytest.raises(SystemExit) as left, open_run(folder) as run:
        run.progress("train", 1, 10, "steps")
        fill(small_disk, 0)
        for step in range(1000):
            run.log(step, {"train/loss": 1.0})
    assert left.value.code == 2
    assert "is full: nothing can be written" in (folder / "error.txt").read_text()


def test_other_errors_of_a_write_are_not_taken_for_a_full_disk(folder, engine):
    assert not disk_is_full(OSError(13, "Permission denied"))
    with pytest.raises(PermissionError), open_run(folder) as run:

        def export(model, place):
            raise PermissionError(13, "Permission denied")

        run.save_checkpoint(engine, 1, {}, export)
    assert not list((folder / "checkpoints").iterdir())


def test_no_rank_puts_in_place_what_another_could_not_write(folder, engine):
    class TwoRanks:
        rank = 0

        def all_gather_objects(self, value):
            return [None, "the disk of the other machine is full"]

    with open_run(folder) as run:
        target = run.folder.checkpoint(1)
        checkpoints.begin(target)
        with pytest.raises(EnvironmentProblem, match="other machine"):
            raise_in_all_ranks(TwoRanks(), None, EnvironmentProblem, target)
    assert not list((folder / "checkpoints").iterdir())


# --- what stays


def test_the_last_the_best_and_what_others_name_stay(tmp_path):
    run = RunFolder(tmp_path / "grpo-s0-a")
    finished(run.checkpoints, 1, 2, 3, 4, 5)
    values = {1: 0.2, 2: 0.9, 3: float("nan"), 5: 0.3}
    lines = [json.dumps({"step": step, "eval/pass_at_1": value}) for step, value in values.items()]
    run.metrics.write_text("\n".join(lines) + "\n")
    other = RunFolder(tmp_path / "rejection_sft-s0-b")
    other.path.mkdir()
    named = {"reads_from": {"grpo": {"checkpoint": str(run.checkpoint(3)), "run_id": run.run_id}}}
    other.config.write_text(json.dumps(named)[:-5])  # cut off: being written in this moment
    (run.checkpoints / ".step-9.damaged").mkdir()
    retention.prune(run, 1, ("eval/pass_at_1", "max"))
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-2", "step-3", "step-5"]
    other.config.unlink()
    retention.prune(run, 1, ("eval/pass_at_1", "min"))
    assert checkpoints.steps(run.checkpoints) == [5]  # the best of those that are left
    retention.prune(run, 0)
    assert checkpoints.steps(run.checkpoints) == [5]


def test_a_longer_number_is_another_checkpoint(tmp_path):
    run, other = RunFolder(tmp_path / "a"), RunFolder(tmp_path / "b")
    finished(run.checkpoints, 1, 10, 11)
    other.path.mkdir()
    other.record.write_text(json.dumps({"parents": {"weights": {"checkpoint": str(run.checkpoint(10))}}}))
    assert retention.named_by_others(run, [1, 10]) == {10}


def test_a_checkpoint_goes_only_when_the_newer_one_is_there(folder, engine, monkeypatch):
    with open_run(folder) as run:
        save(run, engine, 1, 2)
        run.saved()
        seen, real = [], checkpoints.finish

        def finish(*given):
            seen.append(checkpoints.steps(run.folder.checkpoints))
            real(*given)

        monkeypatch.setattr(checkpoints, "finish", finish)
        save(run, engine, 3)
    assert seen == [[1, 2]]
    assert checkpoints.steps(folder / "checkpoints") == [2, 3]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("stage.save_every=0", "needs stage.save_every above 0"),
        ("stage.save_every=4 stage.eval.every=6", "multiple of stage.save_every=4"),
        ("stage.keep_best_direction=up", "none of max, min"),
    ],
)
def test_the_best_must_be_among_what_is_saved(given, told):
    with pytest.raises(ConfigError, match=told):
        tiny("grpo", "stage.keep_best=eval/pass_at_1", *given.split())


@pytest.mark.parametrize("name", ["train/nonsense", "train/los"])
def test_a_best_by_what_is_not_logged_is_refused_at_the_first_save_and_goes_on(folder, engine, name):
    folder = write_run(folder.with_name("best"), tiny("pretrain", f"stage.keep_best={name}"))
    with pytest.raises(SystemExit) as left, open_run(folder) as run:
        save(run, engine, 1)
    told = (folder / "error.txt").read_text()
    assert left.value.code == 2 and told.count("\n") == 1
    assert f"stage.keep_best={name} is no metric of this run; did you mean train/loss?" in told
    assert checkpoints.steps(folder / "checkpoints") == [1], "nothing is lost"


def test_a_best_by_what_is_logged_later_is_waited_for(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(LINES[0])
    evaluated = tiny(
        "grpo", "stage.save_every=1", "stage.eval.every=2", "stage.keep_best=eval/pass_at_1"
    ).stage
    assert retention.unknown_best(tmp_path / "metrics.jsonl", evaluated, 1) is None
    assert "known: a" in (retention.unknown_best(tmp_path / "metrics.jsonl", evaluated, 2) or "")
    warmed_up = tiny("grpo", "stage.algorithm=ppo", "stage.ppo.value_warmup_steps=3").stage
    assert retention.logged_from(warmed_up, "train/loss") == 4
    later = tiny("all_scenario", "stage.max_steps=8", "stage.preference.last_steps=3").stage
    assert retention.logged_from(later, "rewards/helpful/mean") == 6
    assert retention.logged_from(later, "reward") == 1


def test_the_best_of_a_run_is_kept(folder, engine):
    config = tiny("pretrain", "stage.keep=1", "stage.keep_best=train/loss", "stage.keep_best_direction=min")
    folder = write_run(folder.with_name("best"), config)
    with open_run(folder) as run:
        save(run, engine, 1, 2, 3)
    assert checkpoints.steps(folder / "checkpoints") == [1, 3]
