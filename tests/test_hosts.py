"""Several machines: the hostfile, DeepSpeed's launchers, and what ranks find on the machines."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fake_hosts
import pytest
from jobs import tiny

from r1pipe.config import RunConfig
from r1pipe.config.compose import compose
from r1pipe.core.errors import ConfigError, EnvironmentProblem
from r1pipe.core.paths import RunFolder
from r1pipe.launch import command as launch
from r1pipe.launch import hosts as launch_hosts
from r1pipe.runs import hosts, locks, machine

TOLD = """
import json, os, sys
from dataclasses import asdict
from r1pipe.train.engine.discovery import discover
place = discover()
with open(f"{sys.argv[1]}/rank-{place.rank}.json", "w") as file:
    json.dump({"place": asdict(place), "variables": dict(os.environ)}, file)
"""
SLURM = "{nodes:2,partition:null,account:null,time:null,lines:[]}"
STRANGE = '/tmp/a b/$c`d"e\\f;g'


def config_of(hostfile: Path, *words: str) -> RunConfig:
    words = ("engine.ranks=2", f"engine.hostfile={hostfile}", *words)
    return compose(["stage=pretrain", "engine=cpu", *words]).config


def slurm_config(*words: str) -> RunConfig:
    words = ("engine.launcher=slurm", "engine.ranks=2", f"engine.slurm={SLURM}", *words)
    return compose(["stage=pretrain", "engine=cpu", *words]).config


@pytest.fixture
def two_hosts(tmp_path: Path) -> Path:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# ours\n127.0.0.1 slots=2\n\n127.0.0.2  slots=2 # the slow one\n")
    return hostfile


@pytest.fixture
def reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run whose script says what it is told, with stand-ins for what reaches the machines."""
    fake_hosts.install(tmp_path / "bin")
    (tmp_path / "bin" / "ssh").write_text("#!/bin/sh\nexit 9\n")  # on some clusters nobody may
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/tmp/triton")
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "pretrain.py").write_text(TOLD)
    for module in (launch, launch_hosts):
        monkeypatch.setattr(module, "stages_dir", lambda: tmp_path / "stages")
    users = tmp_path / "users"
    users.write_text("SITE=here\n\n")
    monkeypatch.setenv("DS_ENV_FILE", str(users))
    run = RunFolder(tmp_path / "a run of 100%")
    run.create()
    return run


def started(config: RunConfig, run: RunFolder) -> subprocess.CompletedProcess[str]:
    """The job's command, to its end."""
    line = launch.command(config, run, machine.find_launcher(config.engine))
    with launch.job_environment(config, line, "4711") as variables:
        run.launch.write_text("4711")
        if config.engine.has_agents:
            line = launch_hosts.give_orders(config, run, line, "4711", variables)
        return subprocess.run(line, env=variables, capture_output=True, text=True, timeout=1800, check=False)


def told(run: RunFolder) -> list[dict]:
    """What each of the four ranks found."""
    return [json.loads((run.path / f"rank-{rank}.json").read_text()) for rank in range(4)]


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "slurm"])
def test_ranks_on_other_machines_find_one_another_and_what_they_need(
    two_hosts: Path, reached: RunFolder, monkeypatch: pytest.MonkeyPatch, launcher: str
) -> None:
    monkeypatch.setenv("HF_HOME", "/models" if launcher == "openmpi" else STRANGE)
    words = ["engine.master_port=23456"]
    if launcher == "slurm":
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_JOB_NODELIST", fake_hosts.SLURM_HOSTS)
        config = slurm_config(*words)
    else:
        config = config_of(two_hosts, f"engine.launcher={launcher}", *words)
    done = started(config, reached)
    assert done.returncode == 0, done.stdout + done.stderr
    here = launch.shown_variables(config)
    for rank, of_rank in enumerate(told(reached)):
        place = of_rank["place"]
        assert (place["rank"], place["world_size"], place["local_rank"]) == (rank, 4, rank % 2)
        assert place["master"][1] == 23456 and place["master"] == told(reached)[0]["place"]["master"]
        found = of_rank["variables"]
        assert {name: found[name] for name in here} == here
        assert found["HF_HOME"] == os.environ["HF_HOME"] and found["TRITON_CACHE_DIR"] == "/tmp/triton"
        assert found["PATH"] == machine.search_path()
        assert found[locks.LAUNCH] == "4711" and found["OMP_NUM_THREADS"] == "1"
        assert found["SITE"] == "here"
    if launcher != "openmpi":
        assert reached.orders.stat().st_mode & 0o77 == 0, "others may read the variables"


def test_an_interpreter_may_be_named_for_each_machine(
    tmp_path: Path, two_hosts: Path, reached: RunFolder
) -> None:
    for name in ("127.0.0.1", "127.0.0.2"):
        python = tmp_path / f"python of {name}"
        python.write_text(f'#!/bin/sh\nSITE_PYTHON="{name}" exec {sys.executable} "$@"\n')
        python.chmod(0o755)
    key = f"engine.interpreter='{tmp_path}/python of {{host}}'"
    done = started(config_of(two_hosts, "engine.launcher=pdsh", key), reached)
    assert done.returncode == 0, done.stdout + done.stderr
    used = [of_rank["variables"]["SITE_PYTHON"] for of_rank in told(reached)]
    assert used == ["127.0.0.1", "127.0.0.1", "127.0.0.2", "127.0.0.2"]


def test_openmpi_is_not_given_what_it_would_change(
    tmp_path: Path, two_hosts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(two_hosts, "engine.launcher=openmpi")
    line = launch.command(config, RunFolder(tmp_path / "run"))
    monkeypatch.setenv("HF_HOME", STRANGE)
    with pytest.raises(EnvironmentProblem, match="cannot hand HF_HOME="):  # noqa: SIM117
        with launch.job_environment(config, line):
            pytest.fail("it has been written")


def test_the_command_says_what_the_keys_say(tmp_path: Path, two_hosts: Path) -> None:
    def line_of(*words: str) -> list[str]:
        return launch.command(config_of(two_hosts, *words), RunFolder(tmp_path / "run"))

    line = line_of("engine.launcher=pdsh", "engine.launcher_args='-u 9'")
    assert line[:8] == ["pdsh", "-S", "-R", "ssh", "-f", launch_hosts.FAN_OUT, "-w", "127.0.0.1,127.0.0.2"]
    assert line[8:10] == ["-u", "9"]
    line = line_of("engine.launcher=openmpi")
    assert line[line.index("--master_addr") + 1] == "127.0.0.1" and "--no_ssh_check" in line
    assert "--num_accelerators" not in line, "the hostfile has the slots"
    assert "--force_multi" in line, "one machine may be another one"
    local = compose(["stage=pretrain", "engine.master_port=29000"]).config
    assert "--master_port 29000" in " ".join(launch.command(local, RunFolder(tmp_path / "run")))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["engine.master_addr=a"], "=a is for several machines; drop it, or give engine.hostfile"),
        (["engine.ssh_port=22"], "engine.ssh_port=22 is for several machines"),
        (["engine.launcher_args=-x"], "engine.launcher_args=-x is for several machines"),
        (["engine=slurm", "model=small", "engine.ssh_port=22"], "is for engine.launcher=pdsh"),
        (["engine.launcher=slurm"], "choose engine=slurm"),
        (["engine=slurm", "model=small", "engine.hostfile=h"], "machines that Slurm gives; drop"),
        (["engine=cluster", "model=small", "engine.launcher=openmpi", "engine.interpreter=p"], "or slurm;"),
        (["engine.master_port=0"], "engine.master_port"),
    ],
)  # fmt: skip
def test_keys_of_several_machines_are_refused_where_they_would_do_nothing(
    words: list[str], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        compose(["stage=pretrain", *words])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("first slots=2\nsecond\n", ":2: 'second' is not of the form NAME slots=8"),
        ("first slots=0\n", ":1: 'first slots=0' is not of the form"),
        ("first slots=2\nfirst slots=2\n", ":2: first is there twice"),
        ("# nobody\n", "names no machine; write NAME slots=8"),
        (None, "does not exist; write one line per machine: NAME slots=8"),
        ("first slots=2\nsecond slots=4\n", "gives second slots=4, but .* engine.ranks=2 on each machine"),
        ("first slots=2\n", "engine.launcher=pdsh needs the command pdsh; install it"),
    ],
)
def test_a_hostfile_that_cannot_be_meant_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, told: str
) -> None:
    hostfile = tmp_path / "hosts"
    if text is not None:
        hostfile.write_text(text)
    monkeypatch.setenv("PATH", str(tmp_path))
    engine = replace(tiny("pretrain").engine, hostfile=str(hostfile), launcher="pdsh", ranks=2)
    with pytest.raises(EnvironmentProblem, match=told) as problem:
        hosts.check(engine)
    assert "\n" not in str(problem.value)
