"""A real MLflow server, killed in the middle of a run: nothing lost, nothing twice, the same as rebuilt."""

import json
import shutil
from pathlib import Path

import pytest
from forked import LIMIT_S
from runfolders import build, metric_lines, record, write_json, write_lines
from tracker import Server, eventually, twice, view

from r1pipe.core.errors import EnvironmentProblem
from r1pipe.tracking import Mirror, store, store_uri, sync
from r1pipe.tracking.store import connect

STEPS = 12


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def finish(folder: Path, stage: str, created: str) -> None:
    """What a job leaves at its end."""
    done = build(folder.parent / "scratch", stage, created=created, steps=STEPS, run_id=folder.name)
    for name in ("checkpoints", "evaluation.json", "samples.json"):
        shutil.move(done / name, folder / name)
    shutil.rmtree(folder.parent / "scratch")
    write_json(folder / "record.json", record(stage, folder.name, 0, created, STEPS))


def points_of(uri: str, name: str) -> list:
    return view(uri)["runs"].get(name, [{"points": {}}])[0]["points"].get("train/loss", [])


def is_listed(root: Path, name: str) -> bool:
    return (root / "mlflow.db").exists() and name in view(store_uri(root))["runs"]


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("r1pipe.tracking.mirror.EVERY_S", 0.05)
        yield


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = Server(tmp_path_factory.mktemp("server"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "PATIENCE_S", LIMIT_S)
        yield running.start()
        running.kill()


@pytest.mark.slow
def test_a_server_that_dies_in_the_middle_gets_everything_once_when_it_is_back(tmp_path, server, monkeypatch):
    said: list[str] = []
    first = build(tmp_path, "cold_start", finished=False, steps=0, uri=server.uri)
    lines = metric_lines("cold_start", STEPS)
    write_lines(first / "metrics.jsonl", lines[:4])
    mirror = Mirror(first, config_of(first), said.append)
    eventually(lambda: len(points_of(server.uri, "cold_start-0")) == 4)
    server.kill()
    write_lines(first / "metrics.jsonl", lines[4:8])
    eventually(lambda: bool(said))
    mirror.poll()
    write_lines(first / "metrics.jsonl", lines[8:])
    finish(first, "cold_start", "2026-01-01T10:00:00")
    assert mirror.finish() is None
    assert len(said) == 1 and "r1pipe sync" in said[0] and "\n" not in said[0]
    assert (first / "mirrored").read_text() == "behind\n"

    server.start()
    second = build(tmp_path, "grpo", steps=STEPS, created="2026-01-01T11:00:00", uri=server.uri)
    assert Mirror(second, config_of(second)).finish() == "models:/r1pipe@grpo"
    assert (first / "mirrored").read_text() == "whole\n", "the next start brings what was left behind"
    shown = view(server.uri)
    assert twice(shown) == [] and set(shown["runs"]) == {"pipeline laptop", "cold_start-0", "grpo-0"}
    points = shown["runs"]["cold_start-0"][0]["points"]["train/loss"]
    assert [point[0] for point in points] == list(range(1, STEPS + 1))
    assert sync(tmp_path) == (2, [])
    assert view(server.uri) == shown, "a second time changes nothing"

    fresh = f"sqlite:///{tmp_path}/fresh.db"
    assert sync(tmp_path, uri=fresh, rebuild=True) == (2, [])
    assert view(fresh) == shown, "made from the run folders alone, point by point the same"
    assert sync(tmp_path, rebuild=True) == (2, [])
    assert view(server.uri) == shown


def test_a_server_that_is_away_at_the_start_is_refused_with_the_way_to_run_without(tmp_path):
    folder = build(tmp_path, "grpo", uri="http://name:hunter2hunter2@127.0.0.1:9")
    with pytest.raises(EnvironmentProblem) as caught:
        Mirror(folder, config_of(folder))
    told = str(caught.value)
    assert "tracking.uri=http://127.0.0.1:9 " in told and "tracking=none" in told and "hunter2" not in told


def test_a_rebuild_replaces_its_own_runs_and_leaves_others_alone(tmp_path):
    for stage, created in (("cold_start", "10"), ("grpo", "11")):
        folder = build(tmp_path, stage, steps=4, created=f"2026-01-01T{created}:00:00")
        Mirror(folder, config_of(folder)).finish()
    client = connect(store_uri(tmp_path))
    stranger = client.create_run(client.create_experiment("mine")).info.run_id
    before = view(store_uri(tmp_path))
    assert before["models"]["r1pipe"]["aliases"] == {"cold_start": "cold_start-0", "grpo": "grpo-0"}
    assert sync(tmp_path, rebuild=True) == (2, [])
    assert view(store_uri(tmp_path)) == before
    assert client.get_run(stranger).info.lifecycle_stage == "active"
    for run in before["runs"]["grpo-0"]:
        assert run["parent"] == "pipeline laptop"
        assert [name for name, *_ in run["inputs"]] == ["world"]


def test_an_older_run_that_comes_in_late_does_not_take_the_alias(tmp_path):
    old = build(tmp_path, "grpo", steps=2, created="2026-01-01T10:00:00", run_id="grpo-old")
    new = build(tmp_path, "grpo", steps=2, created="2026-01-02T10:00:00", run_id="grpo-new")
    Mirror(new, config_of(new)).finish()
    Mirror(old, config_of(old)).finish()
    assert view(store_uri(tmp_path))["models"]["r1pipe"]["aliases"] == {"grpo": "grpo-new"}


def test_names_with_quotes_are_looked_for_as_they_are(tmp_path):
    folder = build(tmp_path / "it's mine", "grpo", steps=2)
    for _ in range(2):
        Mirror(folder, config_of(folder)).finish()
    assert twice(view(store_uri(folder.parent))) == []


def test_a_run_that_is_being_mirrored_is_left_to_its_mirror(tmp_path):
    folder = build(tmp_path, "grpo", steps=2, finished=False)
    mirror = Mirror(folder, config_of(folder))
    eventually(lambda: is_listed(tmp_path, "grpo-0"))
    assert sync(tmp_path, rebuild=True) == (0, ["grpo-0"])
    mirror.finish()
    assert view(store_uri(tmp_path))["runs"]["grpo-0"][0]["status"] == "FAILED"
    assert sync(tmp_path) == (1, [])
