"""One job from start to end: its folder, its command, how it fails, who may run it, how it is stopped."""

import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from fakes import House
from forked import wait_until
from rich.live import Live

from r1pipe.config import RunConfig
from r1pipe.config.compose import compose
from r1pipe.config.groups import read
from r1pipe.core.errors import ConfigError, EnvironmentProblem
from r1pipe.core.paths import RunFolder
from r1pipe.launch import command as launch
from r1pipe.launch import pipeline
from r1pipe.launch.job import Job, failure
from r1pipe.plan import footprint
from r1pipe.runs import locks, machine


def config_for(house: House, *words: str) -> RunConfig:
    return compose(["stage=pretrain", f"root={house.root}", "tracking=none", *words]).config


def test_a_run_folder_says_what_ran(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    assert house.call("run", "stage=pretrain", "engine.ranks=1", "engine.threads=3") == 0
    run = RunFolder(house.runs()[0])
    written = "".join(path.read_text() for path in (run.config, run.command, run.env))
    assert "hunter2" not in written
    assert json.loads(run.config.read_text())["engine"]["threads"] == 3
    assert json.loads(run.env.read_text())["versions"]["torch"]
    command = run.command.read_text()
    assert "deepspeed --no_local_rank --num_accelerators 1 --master_port" in command
    assert f"stages/pretrain.py {run.path}" in command and "DS_ACCELERATOR=cpu" in command
    assert (run.path / "begun").read_text() == "3\n", "the threads of engine.threads"
    assert "pretrain began" in (run.log / "launcher.txt").read_text()
    assert not run.pid.exists()


def test_dry_run_writes_the_config_and_starts_nothing(house: House, capsys: pytest.CaptureFixture) -> None:
    assert house.call("run", "stage=grpo", "--dry-run") == 0
    out, note = capsys.readouterr()
    run = RunFolder(house.runs()[0])
    assert out.strip() == run.command.read_text().strip() and "deepspeed" in out
    assert "cold_start has no finished run" in note
    assert json.loads(run.config.read_text())["weights_from"] == {
        "stage": "cold_start", "run_id": "", "checkpoint": "", "hash": ""
    }  # fmt: skip
    assert not (run.path / "begun").exists()


def test_a_dry_run_says_what_a_run_would_take_where_it_could_not_start(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Another machine will run it: no GPU here, no parent yet, too small a disk."""
    monkeypatch.undo()
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    assert house.call("run", "stage=grpo", "recipe=gpu", "--dry-run") == 0
    out, err = capsys.readouterr()
    assert "deepspeed --no_local_rank" in out and "stages/grpo.py" in out
    assert re.search(r"^memory: about [\d,]+ MiB a rank \(states [\d,]+, activations", err, re.MULTILINE)
    assert re.search(r"^disk: \d+ checkpoints of [\d,]+ MiB: ", err, re.MULTILINE)
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 2 and "engine.accelerator=cuda finds no NVIDIA GPU" in notes[1]
    assert house.call("run", "stage=pretrain", "model=v3", "stage.keep=40", "--dry-run") == 0
    assert "MiB free, but checkpoints need up to" in capsys.readouterr().err
    assert house.call("doctor", "stage=grpo", "recipe=gpu") == 1
    told = capsys.readouterr().out
    assert "memory, at most" in told and "MiB a rank" in told and "disk, at most" in told


def test_the_largest_recipe_starts_on_64_machines_and_fits(
    house: House, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    hostfile, recipe = tmp_path / "hostfile", read("recipe/cluster")
    hostfile.write_text("".join(f"h{number} slots=8\n" for number in range(64)))
    for stage in {*recipe["stages"], *recipe["controls"]} - {"base"}:
        words = (f"stage={stage}", "recipe=cluster", f"engine.hostfile={hostfile}", "--dry-run")
        assert house.call("run", *words) == 0
        out, err = capsys.readouterr()
        assert "h63" in out
        [mebibytes] = re.findall(r"^memory: about ([\d,]+) MiB a rank", err, re.MULTILINE)
        if stage != "reward_model":  # two rows of 163,840 tokens, which no pair has
            assert float(mebibytes.replace(",", "")) * 2**20 < 0.9 * 80e9


def test_a_dry_run_leaves_a_run_that_is_there_as_it_is(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("FAKE", "killed")
    assert house.call("run", "stage=pretrain") == 1
    [run] = house.runs()

    def written() -> dict[Path, tuple[int, bytes]]:
        files = [path for path in run.rglob("*") if path.is_file()]
        return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = written()
    capsys.readouterr()
    assert house.call("run", "stage=pretrain", "stage.save_every=7", "--dry-run") == 0
    assert f"stages/pretrain.py {run}" in capsys.readouterr().out
    assert house.call("run", "stage=pretrain", "stage.optim.lr=0.1", "--dry-run") == 2
    assert "is unfinished (at step 1) with another config" in capsys.readouterr().err
    assert written() == before and house.runs() == [run]


def test_a_run_that_goes_on_with_other_code_says_so_and_keeps_what_it_was(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    facts = machine.facts()

    def code_is(revision: str, diff: str, torch: str) -> None:
        code = {"revision": revision, "dirty": bool(diff)}
        versions = {name: torch if name == "torch" else "1.0" for name in machine.PACKAGES}
        monkeypatch.setattr(machine, "facts", lambda: {**facts, "code": code, "versions": versions})
        monkeypatch.setattr(machine, "code_diff", lambda: diff)

    code_is("a" * 40, "the diff of then\n", "2.12")
    assert house.call("run", "stage=pretrain", "--dry-run") == 0
    code_is("b" * 40, "the diff of then\n", "2.12")
    monkeypatch.setenv("FAKE", "killed")
    assert house.call("run", "stage=pretrain") == 1
    run = RunFolder(house.runs()[0])
    assert house.call("run", "stage=pretrain") == 1
    assert "code or packages" not in capsys.readouterr().err
    assert not run.config_history.exists(), "nothing has run with what the dry run was written with"
    code_is("c" * 40, "the diff of now\n", "2.13")
    monkeypatch.setenv("FAKE", "ok")
    assert house.call("run", "stage=pretrain") == 0
    then, now = (hashlib.sha256(f"the diff of {when}\n".encode()).hexdigest() for when in ("then", "now"))
    [told] = [line for line in capsys.readouterr().err.splitlines() if "code or packages" in line]
    assert told == (
        f"{run.run_id}: code or packages have changed: code.revision: {'b' * 12} -> {'c' * 12}, "
        f"code.diff_hash: {then[:12]} -> {now[:12]}, versions.torch: 2.12 -> 2.13 "
        "(kept in config_history.jsonl)"
    )
    [row] = [json.loads(line) for line in run.config_history.read_text().splitlines()]
    assert row["changed"] == {
        "code.revision": ["b" * 40, "c" * 40],
        "code.diff_hash": [then, now],
        "versions.torch": ["2.12", "2.13"],
    }
    assert run.earlier_diff(then).read_text() == "the diff of then\n"
    assert run.diff.read_text() == "the diff of now\n"
    assert json.loads(run.env.read_text())["code"]["revision"] == "c" * 40


def test_a_users_mistake_inside_the_job_is_one_line(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("FAKE", "user_error")
    assert house.call("run", "stage=pretrain") == 2
    assert capsys.readouterr().err.splitlines()[-1] == "data.path=nowhere.json does not exist; give another"


def test_what_a_job_would_not_find_is_told_before_it_starts_or_writes(
    house: House, capsys: pytest.CaptureFixture
) -> None:
    empty = house.root.parent / "empty"
    empty.mkdir()
    missing = "data.path=nowhere.jsonl"
    for path, told in {
        missing: f"{missing} does not exist; give a file, or the folder that holds it",
        f"data.path={empty}": f"data.path={empty} holds none of the files of data=mawps: mawps.jsonl",
        "data.path=null": "data=mawps needs mawps.jsonl; set data.path=FILE, or the folder that holds it",
    }.items():
        assert house.call("run", "stage=cold_start", "data=mawps", path) == 2
        assert capsys.readouterr().err == f"r1pipe: {told}\n"
    config = config_for(house, "tracking=mlflow", "tracking.uri=http://127.0.0.1:1")
    with pytest.raises(EnvironmentProblem, match=r"no MLflow server at tracking\.uri"):
        pipeline.start(pipeline.plan_run(config))
    assert capsys.readouterr().err == "" and not house.root.exists()


def test_a_crash_shows_the_end_of_the_log_and_where_it_is(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("FAKE", "crash")
    assert house.call("run", "stage=pretrain") == 1
    told = capsys.readouterr().err
    assert "RuntimeError: a tensor has the wrong shape" in told
    assert str(house.runs()[0] / "log" / "launcher.txt") in told


def test_a_killed_job_is_a_failure_though_the_launcher_says_nothing(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE", "killed")
    assert house.call("run", "stage=pretrain") == 1


def wait_for(path: Path) -> None:
    wait_until(path.exists, f"{path} to appear")


def test_another_config_is_refused_while_a_run_is_in_progress(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("FAKE", "wait")
    placed = pipeline.plan_run(config_for(house))
    job = Job(placed.config, placed.run)
    job.start()
    wait_for(placed.run.path / "waiting")
    capsys.readouterr()
    [rank] = [child for child in psutil.Process(job.process.pid).children() if "python" in child.name()]
    assert rank.environ()[locks.LAUNCH] == placed.run.launch.read_text() != ""
    try:
        assert house.call("run", "stage=pretrain", "engine.ranks=1") == 2
        assert (
            f"run {placed.run.run_id} is already running (process {job.process.pid} on "
            in capsys.readouterr().err
        )
        assert (placed.run.path / "begun").read_text().count("\n") == 1
    finally:
        os.killpg(job.process.pid, signal.SIGTERM)
        assert job.end() == 128 + signal.SIGTERM
    monkeypatch.setenv("FAKE", "ok")
    assert house.call("run", "stage=pretrain") == 0
    assert len(house.runs()) == 1, "once the first is gone, its run goes on"


def test_a_pid_file_of_a_process_that_is_gone_stops_nobody(house: House) -> None:
    assert house.call("run", "stage=pretrain", "--dry-run") == 0
    run = RunFolder(house.runs()[0])
    # our number, but begun at another time
    locks.Holder(socket.gethostname(), "long ago", [(os.getpid(), 1.0)]).write(run.pid)
    assert house.call("run", "stage=pretrain") == 0
    assert len(house.runs()) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_whole_job_and_the_next_call_goes_on(
    house: House, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setenv("FAKE", "wait")
    placed = pipeline.plan_run(config_for(house))
    job = Job(placed.config, placed.run)
    job.start()
    wait_for(placed.run.path / "waiting")
    family = psutil.Process(job.process.pid).children(recursive=True)
    assert family
    sender = f"import os, time; time.sleep(0.3); os.kill({os.getpid()}, {int(number)})"
    subprocess.Popen([sys.executable, "-c", sender])
    job.follow()
    code = job.end()
    assert code == 128 + number
    told = failure(placed.run, code)
    assert told.endswith("was interrupted; the same command resumes from step 1")
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family)
    again = pipeline.plan_run(placed.config)
    assert again.run.path == placed.run.path and "resumes from step 1" in again.describe()


def test_an_interrupted_reproduction_says_so_in_one_line_and_goes_on(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("FAKE", "wait")
    sender = (
        "import os, pathlib, time\n"
        f"while not list(pathlib.Path({str(house.root)!r}).glob('*/waiting')): time.sleep(0.05)\n"
        f"os.kill({os.getpid()}, {int(signal.SIGINT)})\n"
    )
    subprocess.Popen([sys.executable, "-c", sender])
    assert house.call("reproduce", "recipe=smoke") == 130
    [run] = house.runs()
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == f"{run.name} was interrupted; the same command resumes from step 1"
    monkeypatch.setenv("FAKE", "ok")
    assert house.call("reproduce", "recipe=smoke") == 0
    assert f"{run.name}: resumes from step 1" in capsys.readouterr().err


def test_what_the_machine_lacks_is_told_before_anything_starts(
    house: House, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = config_for(house)
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(EnvironmentProblem, match=r"compiler no-such-compiler is missing.*apt install"):
        machine.find_launcher(config.engine)
    monkeypatch.undo()
    monkeypatch.setattr(machine, "search_path", lambda: str(tmp_path / "empty"))
    with pytest.raises(EnvironmentProblem, match="`deepspeed` is missing"):
        machine.find_launcher(config.engine)
    (tmp_path / "deepspeed").touch(0o755)
    monkeypatch.setattr(machine, "search_path", lambda: str(tmp_path))
    with pytest.raises(EnvironmentProblem, match="`ninja` is missing"):
        machine.find_launcher(config.engine)
    monkeypatch.undo()
    monkeypatch.setattr(machine, "has_gpu", lambda: False)
    with pytest.raises(EnvironmentProblem, match=r"engine\.accelerator=cuda finds no NVIDIA GPU here"):
        machine.find_launcher(replace(config.engine, accelerator="cuda"))
    monkeypatch.undo()
    with pytest.raises(EnvironmentProblem, match=r"engine\.hostfile=nowhere does not exist"):
        machine.find_launcher(replace(config.engine, hostfile="nowhere"))


def test_a_launcher_that_cannot_start_is_one_line_and_leaves_no_live_display(
    house: House, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    began: list[Live] = []
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(Live, "start", lambda live, refresh=False: began.append(live))
    monkeypatch.setattr(machine, "find_launcher", lambda engine: str(tmp_path / "nowhere"))
    assert house.call("run", "stage=pretrain") == 2
    assert capsys.readouterr().err == (
        f"r1pipe: {tmp_path / 'nowhere'} cannot be started (No such file or directory); install "
        "deepspeed again\n"
    )
    assert not began and not RunFolder(house.runs()[0]).pid.exists()


@pytest.mark.parametrize("place", ["file", "file/deeper"])
@pytest.mark.parametrize(
    "words",
    [
        ["run", "stage=base"],
        ["run", "stage=base", "--dry-run"],
        ["reproduce"],
        ["eval", "bundled"],
        ["report"],
    ],
)
def test_a_root_that_cannot_be_written_is_one_line(
    house: House, tmp_path: Path, capsys: pytest.CaptureFixture, words: list[str], place: str
) -> None:
    (tmp_path / "file").touch()
    house.root = tmp_path / place
    assert house.call(*words) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    if words == ["report"]:
        assert "no finished run under" in told
    else:
        assert re.fullmatch(rf"r1pipe: {house.root}/\S+ cannot be written \(.+\); give root=DIR, .*", told)


def test_a_folder_where_nothing_may_be_written_is_one_line(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As root, whom no mode of a file stops, only the system's answer can be made up."""
    assert house.call("run", "stage=base") == 0
    capsys.readouterr()

    def refused(*arguments: object, **settings: object) -> None:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "TemporaryFile", refused)
        for words in (["run", "stage=base"], ["run", "stage=base", "--dry-run"], ["eval", "base"]):
            assert house.call(*words) == 2
            told = capsys.readouterr().err.splitlines()
            assert "cannot be written (Permission denied); give root=DIR" in told[-1]
    monkeypatch.setattr(Path, "write_bytes", refused)
    assert house.call("report") == 2
    assert "report.html cannot be written (Permission denied)" in capsys.readouterr().err


def test_an_empty_root_is_refused(house: House, capsys: pytest.CaptureFixture) -> None:
    house.root = ""  # type: ignore[assignment]
    for words in (["run", "stage=base"], ["report"], ["eval", "bundled"]):
        assert house.call(*words) == 2
        assert capsys.readouterr().err == "r1pipe: root is empty; give root=DIR, where run folders go\n"


@pytest.mark.parametrize("name", ["a=b", "a#b", "a%b", "it's", "a~b", "läufe", "运行", "a b", "a(b)", 'a"b'])
def test_a_root_may_have_any_name(tmp_path: Path, name: str) -> None:
    root = str(tmp_path / name)
    assert compose(["stage=base", f"root={root}"]).config.root == root
    assert compose(["stage=base", f"root={name}"]).config.root == name


def test_a_tilde_is_the_home_folder_and_what_cannot_be_read_says_how_to_quote(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert compose(["stage=base", "root=~/runs"]).config.root == "/home/ada/runs"
    with pytest.raises(ConfigError, match="several values"):
        compose(["stage=base", "root=a,b"])
    with pytest.raises(ConfigError, match=r"cannot read root=\['a: .*write a string as"):
        compose(["stage=base", "root=['a"])


def test_a_full_disk_is_told_with_both_numbers(house: House, capsys: pytest.CaptureFixture) -> None:
    assert house.call("run", "stage=pretrain", "model=v3", "stage.keep=40") == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"MiB free, but checkpoints need up to [\d,]+ MiB \(41 of [\d,]+ MiB\)", told)
    assert house.runs() == []


def test_the_estimate_of_parameters_is_near_the_published_size() -> None:
    both = [compose(["model=v3", f"model.num_nextn_predict_layers={n}"]).config.model for n in (0, 1)]
    without, with_mtp = map(footprint.parameters, both)
    assert without == pytest.approx(671e9, rel=0.001)
    assert with_mtp - without == pytest.approx(11.5e9, rel=0.02)


def test_deepspeeds_own_launcher_starts_every_rank_and_tells_how_they_ended(
    house: House, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The one test with the real launcher: two ranks, the second of which fails."""
    monkeypatch.undo()
    script = tmp_path / "stages" / "pretrain.py"
    script.write_text(
        "import os, sys\n"
        "open(sys.argv[1] + '/rank-' + os.environ['RANK'] + '-of-' + os.environ['WORLD_SIZE'], 'w')\n"
        "sys.exit(7 * int(os.environ['RANK']))\n"
    )
    monkeypatch.setattr(launch, "stages_dir", lambda: script.parent)
    assert house.call("run", "stage=pretrain") == 7
    assert sorted(path.name for path in house.runs()[0].glob("rank-*")) == ["rank-0-of-2", "rank-1-of-2"]
