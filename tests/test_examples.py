"""The examples in docs/: kubernetes.yaml and skypilot.yaml (their commands, hostfiles, and what their readers
say), and one_cause.py (what each cause changes)."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from r1pipe.config import EngineConfig, to_mapping
from r1pipe.config.compose import compose
from r1pipe.core.paths import content_dir
from r1pipe.runs import hosts

DOCS = Path(__file__).parents[1] / "docs"
READERS = ["kubernetes-validate==1.37.0", "skypilot==0.14.1", "setuptools<81"]  # have the schemas
CHECK = """
import sys, yaml, kubernetes_validate
from sky import Task
from sky.utils import schemas, common_utils
kubernetes, skypilot = (open(path).read() for path in sys.argv[1:])
for document in yaml.safe_load_all(kubernetes):
    kubernetes_validate.validate(document, "1.33", strict=True)
task = yaml.safe_load(skypilot)
common_utils.validate_schema(task, schemas.get_task_schema(), "task: ")
common_utils.validate_schema(task["resources"], schemas.get_resources_schema(), "resources: ")
assert Task.from_yaml_config(task).num_nodes == 2
print("both are sound")
"""


def engine_of(script: str) -> EngineConfig:
    """Of the command in a shell script."""
    [line] = re.findall(r"r1pipe reproduce (.*)", script)
    return compose(shlex.split(line)).config.engine


def test_kubernetes_runs_as_many_ranks_as_its_pods_have_gpus(tmp_path: Path) -> None:
    service, files, job = yaml.safe_load_all((DOCS / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    engine = engine_of(container["args"][0])
    (tmp_path / "hostfile").write_text(files["data"]["hostfile"])
    slots = hosts.slots_of(str(tmp_path / "hostfile"))
    assert len(slots) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert set(slots.values()) == {engine.ranks, container["resources"]["limits"]["nvidia.com/gpu"]}
    assert list(slots) == [f"{job['metadata']['name']}-{i}.{pod['subdomain']}" for i in range(len(slots))]
    assert pod["subdomain"] == service["metadata"]["name"]
    assert pod["terminationGracePeriodSeconds"] > engine.grace_s
    assert {mount["name"] for mount in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert os.path.dirname(engine.hostfile) in [mount["mountPath"] for mount in container["volumeMounts"]]


def test_skypilot_writes_the_hostfile_that_its_command_reads(tmp_path: Path) -> None:
    task = yaml.safe_load((DOCS / "skypilot.yaml").read_text())
    engine = engine_of(task["run"])
    script = task["run"].replace(".venv/bin/r1pipe", "echo")
    told = {"SKYPILOT_NODE_RANK": "0", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}
    told |= {"SKYPILOT_NUM_GPUS_PER_NODE": task["resources"]["accelerators"].partition(":")[2]}
    subprocess.run(["sh", "-ec", script], cwd=tmp_path, env={**os.environ, **told}, check=True)
    slots = hosts.slots_of(str(tmp_path / engine.hostfile))
    assert slots == {"10.0.0.1": engine.ranks, "10.0.0.2": engine.ranks}
    assert task["num_nodes"] == len(slots)


def flat(mapping: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in mapping.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


@pytest.fixture
def one_cause(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What docs/one_cause.py runs for a cause: stage -> its whole config, flat."""

    def stages(cause: str, *overrides: str, finished: tuple[str, ...] = ()) -> dict[str, dict[str, Any]]:
        commands: list[list[str]] = []
        rows = [ROW | {"stage": stage} for stage in finished]

        def record(line: list[str], **_: object) -> SimpleNamespace:
            commands.append(line[1:])
            told = rows if len(commands) == 1 else [ROW, ROW | {"stage": "zero", "level_4": None}]
            return SimpleNamespace(stdout=json.dumps(told))

        monkeypatch.setattr(subprocess, "run", record)
        runpy.run_path(str(DOCS / "one_cause.py"))["main"](cause, *overrides)
        before, *run, after = commands
        assert before == after and before[:2] == ["compare", "--json"]
        assert {line[0] for line in run} <= {"run"}
        configs = [compose(line[1:]).config for line in run]
        return {config.stage.name: flat(to_mapping(config)) for config in configs}

    return stages


ROW = {"stage": "grpo", "pass_at_1": 0.7, "length_mean": 86.2, "reflection_rate": 0.26, "level_4": 0.1}
SAME = {"pipeline", "parent"}
MACHINE = {"engine.ranks", "engine.precision", "engine.zero_level"}  # as many and as low as a processor has


@pytest.mark.parametrize(
    ("cause", "expected"),
    [
        ("length", {"grpo": {"stage.sampling.max_tokens"}}),
        ("reflection", {stage: {"data.thorough"} for stage in ("base", "cold_start", "grpo")}),
    ],
)
def test_a_cause_changes_one_thing(
    one_cause: Any, capsys: pytest.CaptureFixture, cause: str, expected: dict[str, set[str]]
) -> None:
    usual, other = one_cause("nothing", "seed=3"), one_cause(cause, "seed=3")
    assert list(usual) == ["base", "cold_start", "grpo"]
    if cause == "reflection":  # the cause acts on a base of its own, made as the bundled one
        record = flat(json.loads((content_dir() / "base" / "record.json").read_text())["config"])
        pretrain = other.pop("pretrain")
        changed = {key for key in record if record[key] != pretrain.get(key) and ".eval." not in key}
        assert changed - SAME - {"seed", "root"} - MACHINE == {"data.thorough"}
        assert other["base"]["parent"] == other["cold_start"]["parent"] == "pretrain"
    assert list(other) == list(usual)
    assert {config["seed"] for config in (usual | other).values()} == {3}
    for stage, config in usual.items():
        changed = {key for key in config if config[key] != other[stage][key]} - SAME
        assert changed == expected.get(stage, set()), stage
    shown = capsys.readouterr().out
    assert "grpo           70.0%      86     26.0%    10.0%\n" in shown
    assert "zero           70.0%      86     26.0%        -\n" in shown


def test_an_interrupted_command_goes_on_where_it_was(one_cause: Any) -> None:
    assert list(one_cause("reflection", finished=("pretrain", "base"))) == ["cold_start", "grpo"]


def test_without_a_cause_it_says_which_there_are() -> None:
    done = subprocess.run(
        [sys.executable, DOCS / "one_cause.py", "lenght"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "python docs/one_cause.py length" in done.stderr
    assert len((DOCS / "one_cause.py").read_text().splitlines()) <= 60


@pytest.mark.slow
def test_those_who_read_them_find_them_sound(tmp_path: Path) -> None:
    """By the JSON schemas of Kubernetes 1.33, and SkyPilot's own checks, in an environment of their own."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    line = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *READERS]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"pip cannot fetch what reads them: {done.stderr.strip().splitlines()[-1]}")
    files = [DOCS / "kubernetes.yaml", DOCS / "skypilot.yaml"]
    done = subprocess.run(
        [python, "-c", CHECK, *files], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0 and "both are sound" in done.stdout, done.stderr[-3000:]
