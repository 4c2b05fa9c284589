"""Several machines: the hostfile, DeepSpeed's launchers, and what ranks find on the machines."""

import json
import os
import subprocess
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
from r1pipe.launch.hosts import HANDED_ON
from r1pipe.runs import hosts, locks, machine

TOLD = """
import json, os, sys
from dataclasses import asdict
from r1pipe.train.engine.discovery import discover
place = discover()
with open(f"{sys.argv[1]}/rank-{place.rank}.json", "w") as file:
    json.dump({"place": asdict(place), "variables": dict(os.environ)}, file)
"""
STRANGE = '/tmp/a b/$c`d"e\\f;g'


def config_of(hostfile: Path, *words: str) -> RunConfig:
    words = ("engine.ranks=2", f"engine.hostfile={hostfile}", *words)
    return compose(["stage=pretrain", "engine=cpu", *words]).config


@pytest.fixture
def two_hosts(tmp_path: Path) -> Path:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# ours\n127.0.0.1 slots=2\n\n127.0.0.2  slots=2 # the slow one\n")
    return hostfile


@pytest.mark.parametrize("launcher", ["pdsh", "openmpi", "slurm"])
def test_ranks_on_other_machines_find_one_another_and_what_they_need(
    tmp_path: Path, two_hosts: Path, monkeypatch: pytest.MonkeyPatch, launcher: str
) -> None:
    """DeepSpeed's own runner, with a stand-in for what reaches the machines."""
    fake_hosts.install(tmp_path / "bin")
    if launcher != "pdsh":
        (tmp_path / "bin" / "ssh").write_text("#!/bin/sh\nexit 9\n")  # on some clusters nobody may
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("HF_HOME", "/models" if launcher == "openmpi" else STRANGE)
    monkeypatch.setenv("TRITON_CACHE_DIR", "/tmp/triton")
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "pretrain.py").write_text(TOLD)
    monkeypatch.setattr(launch, "stages_dir", lambda: tmp_path / "stages")
    users = tmp_path / "users"
    users.write_text("SITE=here\n\n")
    monkeypatch.setenv("DS_ENV_FILE", str(users))
    config = config_of(two_hosts, f"engine.launcher={launcher}", "engine.master_port=23456")
    run = RunFolder(tmp_path / "run")
    run.create()
    line = launch.command(config, run, machine.find_launcher(config.engine))
    with launch.job_environment(config, line, "4711") as variables:
        done = subprocess.run(line, env=variables, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = [json.loads((run.path / f"rank-{rank}.json").read_text()) for rank in range(4)]
    for rank, of_rank in enumerate(told):
        place = of_rank["place"]
        assert (place["rank"], place["world_size"], place["local_rank"]) == (rank, 4, rank % 2)
        assert place["master"][1] == 23456 and place["master"] == told[0]["place"]["master"]
        found = of_rank["variables"]
        wanted = {name: variables[name] for name in HANDED_ON if name in variables}
        assert {name: found[name] for name in wanted} == wanted
        assert found[locks.LAUNCH] == "4711" and found["OMP_NUM_THREADS"] == "1"
        assert found["SITE"] == "here"


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

    line = line_of("engine.launcher=pdsh")
    assert "--num_accelerators" not in line, "the hostfile has the slots"
    assert "--force_multi" in line, "one machine may be another one"
    assert "--master_addr" not in line, "the launcher asks the first machine"
    assert int(line[line.index("--master_port") + 1]) in range(20000, 30000)
    words = ["engine.master_addr=10.0.0.1", "engine.master_port=29000", "engine.ssh_port=2222"]
    line = line_of("engine.launcher=pdsh", "engine.launcher_args='-R ssh'", *words)
    shown = " ".join(line)
    assert "--master_port 29000 --master_addr 10.0.0.1 --ssh_port 2222 --launcher_args=-R ssh " in shown
    for launcher in ("openmpi", "slurm"):
        line = line_of(f"engine.launcher={launcher}")
        assert line[line.index("--master_addr") + 1] == "127.0.0.1" and "--no_ssh_check" in line
    local = compose(["stage=pretrain", "engine.master_port=29000"]).config
    assert "--master_port 29000" in " ".join(launch.command(local, RunFolder(tmp_path / "run")))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["engine.master_addr=a"], "=a is for several machines; drop it, or give engine.hostfile"),
        (["engine.ssh_port=22"], "engine.ssh_port=22 is for several machines"),
        (["engine.launcher_args=-x"], "engine.launcher_args=-x is for several machines"),
        (["engine=cluster", "engine.launcher=slurm", "engine.ssh_port=22"], "is for engine.launcher=pdsh"),
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
