"""MLflow's store: created once, whole after a kill, moved along with its root; and the pages that show it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from forked import LIMIT_S
from runfolders import build
from test_tracking import client_of, empty_store, read_config, root, stage_runs  # noqa: F401 (fixtures)
from tracker import twice, view

from r1pipe.config.compose import compose
from r1pipe.core.errors import CheckpointError, ConfigError
from r1pipe.launch import parents
from r1pipe.runs import lineage
from r1pipe.tracking import Mirror, add_report, store_uri, sync
from r1pipe.tracking.store import connect, is_whole

MIRROR = """
import json, sys
from r1pipe.tracking import Mirror
for folder in sys.argv[1:]:
    print(Mirror(folder, json.load(open(f"{folder}/config.json"))).finish())
"""
# MLflow creating its tables in the place itself, as it does by default, killed in the middle
KILLED = """
import os, sys
from sqlalchemy import event
from sqlalchemy.engine import Engine
seen = []
@event.listens_for(Engine, "before_cursor_execute")
def count(connection, cursor, statement, *_):
    seen.append("DROP TABLE" in statement)
    if sum(seen) == 2:
        os._exit(9)
from mlflow.tracking import MlflowClient
MlflowClient(sys.argv[1]).search_experiments()
"""


def start(code: str, *words: object) -> subprocess.Popen:
    line = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_several_runs_that_start_together_in_a_fresh_root_share_one_store_and_one_parent(tmp_path):
    stages = ("cold_start", "grpo", "zero")
    started = [start(MIRROR, build(tmp_path, stage, steps=2)) for stage in stages]
    ended = [process.communicate() for process in started]
    assert ended == [(f"models:/r1pipe@{stage}\n", "") for stage in stages]
    shown = view(store_uri(tmp_path))
    assert twice(shown) == [] and len(shown["runs"]) == 1 + len(stages)
    assert {runs[0]["parent"] for name, runs in shown["runs"].items() if "pipeline" not in name} == {
        "pipeline laptop"
    }


def test_a_store_that_a_kill_left_half_created_is_created_again(tmp_path):
    killed = start(KILLED, store_uri(tmp_path))
    killed.communicate()
    assert killed.returncode == 9 and not is_whole(tmp_path / "mlflow.db")
    (tmp_path / "mlflow.db.partial").write_text("left by a kill of r1pipe")
    folder = build(tmp_path, "grpo", steps=2)
    said: list[str] = []
    assert Mirror(folder, read_config(folder), said.append).finish() == "models:/r1pipe@grpo"
    assert said == [] and is_whole(tmp_path / "mlflow.db")
    assert not list(tmp_path.glob("*.partial*"))


def test_what_is_no_database_is_named_with_the_way_out(tmp_path):
    (tmp_path / "mlflow.db").write_text("not a database, but long enough to be looked at" * 100)
    folder = build(tmp_path, "grpo", steps=2)
    said: list[str] = []
    Mirror(folder, read_config(folder), said.append).finish()
    assert len(said) == 1 and f"move {tmp_path / 'mlflow.db'} away" in said[0] and "\n" not in said[0]


@pytest.mark.parametrize("copied", [True, False])
def test_a_root_that_was_moved_or_copied_is_the_same_to_mlflow(root, copied):  # noqa: F811
    for stage in ("cold_start", "grpo"):
        folder = build(root / "runs", stage, steps=4)
        shutil.copy(root / "mlflow.db", root / "runs" / "mlflow.db") if stage == "cold_start" else None
        Mirror(folder, read_config(folder)).finish()
    before = view(store_uri(root / "runs"))
    there = root / "elsewhere"
    shutil.copytree(root / "runs", there) if copied else (root / "runs").rename(there)

    assert parents.resolve(
        "models:/r1pipe@grpo", lineage.SearchPath(there, "laptop", None)
    ).checkpoint == str(there / "grpo-0/checkpoints/step-4")
    resumed = build(there, "rejection_sft", steps=4)
    Mirror(resumed, read_config(resumed)).finish()
    for rebuild in (False, True):
        assert sync(there, rebuild=rebuild) == (3, [])
        shown = view(store_uri(there))
        assert twice(shown) == [] and len(shown["runs"]) == 4
        for name, [run] in before["runs"].items():
            assert shown["runs"][name][0]["files"] == run["files"], "artifacts are where the root is"
        for run in stage_runs(there).values():
            assert run.info.artifact_uri.startswith(there.as_uri())
            assert run.data.tags["r1pipe.run_dir"].startswith(str(there))
    if copied:
        assert view(store_uri(root / "runs")) == before, "nothing was written into the old place"


def test_another_checkpoint_in_the_place_of_a_registered_one_is_refused_after_a_move(root):  # noqa: F811
    folder = build(root, "grpo", steps=2)
    Mirror(folder, read_config(folder)).finish()
    there = root.with_name(f"{root.name}-elsewhere")
    root.rename(there)
    manifest = there / "grpo-0/checkpoints/step-2/manifest.json"
    manifest.write_text(json.dumps({"files": {"config.json": "bb"}}))
    place = lineage.SearchPath(there, "laptop", None)
    with pytest.raises(CheckpointError, match="is not the checkpoint that grpo-0 had"):
        parents.resolve("models:/r1pipe@grpo", place)
    shutil.rmtree(there / "grpo-0")
    with pytest.raises(CheckpointError, match=f"copy the run folder grpo-0 to {there}"):
        parents.resolve("models:/r1pipe@grpo", place)


def test_a_dry_run_is_no_failed_run(root):  # noqa: F811
    build(root, "cold_start", steps=2)
    dry = build(root, "grpo", finished=False, steps=0)
    (dry / "metrics.jsonl").unlink()
    assert sync(root) == (1, [])
    shown = view(store_uri(root))["runs"]
    assert set(shown) == {"pipeline laptop", "cold_start-0"}
    assert shown["pipeline laptop"][0]["status"] == "FINISHED"


def test_an_abandoned_run_does_not_fail_a_pipeline_that_went_on(root):  # noqa: F811
    abandoned = build(root, "grpo", finished=False, steps=2, run_id="grpo-abandoned")
    build(root, "grpo", steps=2)
    os.utime(abandoned / "config.json", (0, 0))
    sync(root)
    shown = view(store_uri(root))["runs"]
    assert shown["grpo-abandoned"][0]["status"] == "FAILED"
    assert shown["pipeline laptop"][0]["status"] == "FINISHED"


def test_a_rebuild_drops_runs_whose_folders_were_removed(root):  # noqa: F811
    for stage in ("cold_start", "grpo"):
        build(root, stage, steps=2)
    sync(root)
    shutil.rmtree(root / "grpo-0")
    assert sync(root, rebuild=True) == (1, [])
    shown = view(store_uri(root))
    assert set(shown["runs"]) == {"pipeline laptop", "cold_start-0"}
    assert shown["models"]["r1pipe"]["aliases"] == {"cold_start": "cold_start-0"}


def test_stages_whose_pipeline_was_deleted_get_a_new_one(root):  # noqa: F811
    for stage in ("cold_start", "grpo"):
        build(root, stage, steps=2)
    sync(root)
    client = client_of(root)
    client.delete_run(stage_runs(root)["grpo-0"].data.tags["mlflow.parentRunId"])
    sync(root)
    shown = view(store_uri(root))["runs"]
    assert {shown[name][0]["parent"] for name in ("cold_start-0", "grpo-0")} == {"pipeline laptop"}


def test_the_pipelines_run_has_table_description_and_report_and_runs_have_names_of_their_own(root):  # noqa: F811
    for run_id in ("grpo-s0-20260101-100000-ab12", "grpo-s0-20260101-110000-cd34"):
        build(root, "grpo", steps=2, run_id=run_id)
    sync(root)
    runs = stage_runs(root)
    assert {run.info.run_name for run in runs.values()} == {"grpo seed 0 (ab12)", "grpo seed 0 (cd34)"}
    client, [parent] = client_of(root), {run.data.tags["mlflow.parentRunId"] for run in runs.values()}
    note = client.get_run(parent).data.tags["mlflow.note.content"]
    assert note.startswith("- In 2 steps grpo takes the mean response length from "), "the story first"
    assert "\n\n| stage | seed | pass@1" in note and "| grpo | 0 | 79.0 77-81 |" in note
    assert str(root) in note
    page = root / "report.html"
    page.write_text("<!doctype html>")
    (root / "curves.png").write_bytes(b"PNG")
    (root / "cards").mkdir()
    (root / "cards" / "DATA_CARD.md").write_text("# Data")
    config = compose([f"root={root}", "pipeline=laptop"]).config
    add_report(config, page)
    logged = {file.path for file in client.list_artifacts(parent)}
    assert logged == {"report.html", "curves.png", "cards", "table.json"}
    assert [file.path for file in client.list_artifacts(parent, "cards")] == ["cards/DATA_CARD.md"]
    [row] = json.loads(Path(client.download_artifacts(parent, "table.json")).read_text())
    assert row["stage"] == "grpo"


def test_a_report_that_mlflow_does_not_take_is_a_warning(tmp_path, capsys):
    config = compose([f"root={tmp_path}", "tracking.uri=http://127.0.0.1:9"]).config
    add_report(config, tmp_path / "report.html")
    err = capsys.readouterr().err
    assert err.startswith("warning: no MLflow server at tracking.uri=http://127.0.0.1:9 ")
    assert err.count("\n") == 1


def test_the_variable_of_mlflow_is_the_default_of_tracking_uri(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert compose([]).config.tracking.uri is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert compose([]).config.tracking.uri == "http://127.0.0.1:9"
    assert compose(["tracking.uri=sqlite:///x.db"]).config.tracking.uri == "sqlite:///x.db"
    assert compose(["tracking.uri=null"]).config.tracking.uri is None
    with pytest.raises(Exception, match=r"tracking\.uri=http://127\.0\.0\.1:9 \(from MLFLOW_TRACKING_URI\)"):
        connect("http://127.0.0.1:9")


@pytest.mark.parametrize("name", ["a/b", "a:b", "''", "."])
def test_a_name_that_mlflow_refuses_at_the_end_is_refused_at_the_start(name):
    with pytest.raises(ConfigError, match=r"tracking\.model_name"):
        compose([f"tracking.model_name={name}"])


def test_the_ui_prints_the_link_once_it_answers_also_to_the_machines_name_and_leaves_nothing(root):  # noqa: F811
    folder = build(root, "grpo", steps=2)
    Mirror(folder, read_config(folder)).finish()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    line = [
        sys.executable,
        "-m",
        "r1pipe",
        "ui",
        f"root={root}",
        "--port",
        str(port),
        "--host",
        "0.0.0.0",
    ]
    shown = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        link = shown.stdout.readline().split()[2]
        charts = f"http://127.0.0.1:{port}/#/experiments/1/runs?compareRunsMode=CHART"
        assert link == f"{charts}&viewStateShareKey=r1pipe"
        shared = json.loads(client_of(root).get_experiment("1").tags["mlflow.sharedViewState.r1pipe"])
        assert shared["searchFilter"] == "tags.`r1pipe.pipeline` = 'laptop'"
        first = [chart["metricKey"] for chart in shared["compareRunCharts"]][:2]
        assert first == ["stages/pass_at_1", "eval/pass_at_1"]
        name = f"{socket.gethostname()}:{port}"
        asked = urllib.request.Request(
            f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/search",
            data=b'{"max_results": 5}',
            headers={"Host": name, "Origin": f"http://{name}", "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(asked, timeout=LIMIT_S) as answer:
            assert "r1pipe" in answer.read().decode()
    finally:
        shown.send_signal(signal.SIGTERM)
        shown.wait()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=5)


def test_a_port_that_is_none_is_refused_in_one_line(tmp_path):
    line = [sys.executable, "-m", "r1pipe", "ui", f"root={tmp_path}", "--port", "80000"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--port" in done.stderr
