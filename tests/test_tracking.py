"""MLflow mirrors run folders: nothing twice, nothing lost, the same names in every stage."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import runfolders
from fake_servers import replying
from runfolders import build, config, metric_lines, write_lines
from tracker import eventually

from r1pipe.config import TrackingConfig
from r1pipe.core.errors import CheckpointError, EnvironmentProblem
from r1pipe.core.paths import RunFolder
from r1pipe.runs.checkpoints import manifest_hash
from r1pipe.runs.files import Tail
from r1pipe.tracking import Mirror, naming, resolve_model, serve_ui, store_uri, sync
from r1pipe.tracking.naming import final_metrics, flatten
from r1pipe.tracking.store import connect
from r1pipe.tracking.writer import RunWriter


def tracking(uri: str | None = None) -> TrackingConfig:
    return TrackingConfig(enabled=True, uri=uri, experiment="r1pipe", model_name="r1pipe")


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def client_of(root: Path):
    from mlflow.tracking import MlflowClient

    return MlflowClient(store_uri(root), store_uri(root))


def stage_runs(root: Path) -> dict:
    client = client_of(root)
    experiment = client.get_experiment_by_name("r1pipe").experiment_id
    runs = client.search_runs([experiment], "tags.`r1pipe.kind` = 'stage'")
    return {run.data.tags["r1pipe.run_id"]: run for run in runs}


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory) -> Path:
    """A database with MLflow's tables: making them takes two seconds, so it is copied."""
    connect(store_uri(folder := tmp_path_factory.mktemp("store")))
    return folder / "mlflow.db"


@pytest.fixture
def root(tmp_path, empty_store) -> Path:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, empty_store) -> Path:
    """Three stages mirrored once; tests only read it."""
    root = tmp_path_factory.mktemp("runs")
    shutil.copy(empty_store, root / "mlflow.db")
    for stage in ("cold_start", "grpo", "rejection_sft"):
        folder = build(root, stage, steps=16)
        (folder / "rollouts").mkdir()
        (folder / "rollouts" / "step-8.parquet").write_bytes(b"PAR1")
        assert Mirror(folder, read_config(folder)).finish() == f"models:/r1pipe@{stage}"
    return root


def test_tail_waits_for_the_rest_of_a_line_and_skips_a_bad_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == []
    path.write_bytes(b'{"step": 1}\n{"step": 2, "tr')
    assert tail.read() == [{"step": 1}]
    with path.open("ab") as file:
        file.write('ain/loss": 0.5, "größe": 1}\n{"half\n[1]\n{"step": 3}\n'.encode())
    assert tail.read() == [{"step": 2, "train/loss": 0.5, "größe": 1}, {"step": 3}]
    path.write_bytes(b'{"step": 1}\n')  # a resumed job cut it back
    assert tail.read() == [{"step": 1}]


def test_stages_are_children_of_one_parent_and_share_metric_names(pipeline):
    runs = stage_runs(pipeline)
    parents = {run.data.tags["mlflow.parentRunId"] for run in runs.values()}
    assert len(parents) == 1
    parent = client_of(pipeline).get_run(parents.pop())
    assert (parent.info.run_name, parent.info.status) == ("laptop", "FINISHED")
    history = client_of(pipeline).get_metric_history(parent.info.run_id, "stages/pass_at_1")
    assert [(p.step, p.value) for p in history] == [(1, 0.44), (2, 0.79), (3, 0.78)], "a point per stage"
    first = {name for name in parent.data.metrics if name.count("/") == 1}
    assert first == {f"stages/{name}" for name in naming.SERIES}, "what MLflow's page draws first"
    cold, grpo = runs["cold_start-0"], runs["grpo-0"]
    names = [{name for name in run.data.metrics if name.startswith("eval/")} for run in (cold, grpo)]
    assert (
        names[0] == names[1] >= {"eval/pass_at_1", "eval/greedy", "eval/word/pass_at_1", "eval/general/facts"}
    )
    assert grpo.data.metrics["eval/pass_at_1"] == 0.79, (
        "the final value stands, not the last short evaluation's"
    )
    assert cold.data.params["stage.optim.lr"] == "0.0003"


def test_the_runs_of_a_sweep_have_one_parent_with_their_table(root):
    for seed in (0, 1):
        folder = build(root, "grpo", seed=seed, steps=1)
        (folder / "sweep").write_text("sweep seed=0,1")
        Mirror(folder, read_config(folder)).finish()
    Mirror(folder := build(root, "zero", steps=1), read_config(folder)).finish()
    runs, client = stage_runs(root), client_of(root)
    parents = {name: run.data.tags["mlflow.parentRunId"] for name, run in runs.items()}
    assert parents["grpo-0"] == parents["grpo-1"] != parents["zero-0"]
    sweep = client.get_run(parents["grpo-0"])
    assert sweep.info.run_name == "sweep seed=0,1" and "stages/pass_at_1" not in sweep.data.metrics
    assert sweep.data.tags["mlflow.note.content"].count("| grpo") == 2
    assert runs["grpo-0"].data.tags["r1pipe.pipeline"] == "laptop"
    sync(root, rebuild=True)
    again = {name: run.data.tags["mlflow.parentRunId"] for name, run in stage_runs(root).items()}
    assert again["grpo-0"] == again["grpo-1"] != again["zero-0"]


def test_metrics_are_logged_by_step(pipeline):
    run = stage_runs(pipeline)["grpo-0"]
    history = client_of(pipeline).get_metric_history(run.info.run_id, "reward")
    expected = metric_lines("grpo", 16)
    assert [(p.step, p.value) for p in history] == [(line["step"], line["reward"]) for line in expected]
    assert history[1].timestamp - history[0].timestamp == 2500


def test_artifacts_inputs_and_model_version(pipeline):
    client, run = client_of(pipeline), stage_runs(pipeline)["rejection_sft-0"]
    run_id = run.info.run_id
    files = {file.path for file in client.list_artifacts(run_id)}
    assert files >= {
        "config.json",
        "samples.json",
        "evaluation.json",
        "record.json",
        "funnel.json",
        "rollouts",
    }
    assert [file.path for file in client.list_artifacts(run_id, "rollouts")] == ["rollouts/step-8.parquet"]
    assert {one.dataset.name for one in run.inputs.dataset_inputs} == {"world", "grpo (grpo-0)"}
    version = client.get_model_version_by_alias("r1pipe", "rejection_sft")
    assert version.run_id == run_id
    folder = pipeline.resolve() / "rejection_sft-0"
    assert version.tags["run_dir"] == str(folder)
    assert version.tags["parents.weights"].startswith("base base-0 1f1f")
    assert version.tags["parents.data"].startswith("grpo grpo-0 2e2e")
    assert version.tags["checkpoint_hash"] == manifest_hash(folder / "checkpoints" / "step-16")
    for name in ("@rejection_sft", f"/{version.version}"):
        found = resolve_model(f"models:/r1pipe{name}", pipeline)
        assert (found.run_id, found.checkpoint) == (folder.name, str(folder / "checkpoints" / "step-16"))


def test_a_resumed_run_logs_nothing_twice(root):
    folder = build(root, "grpo", steps=0, finished=False)
    lines = metric_lines("grpo", 12)
    write_lines(folder / "metrics.jsonl", lines[:8])
    assert Mirror(folder, read_config(folder)).finish() is None
    assert stage_runs(root)["grpo-0"].info.status == "FAILED"

    # the job went back to step 6, so steps 7 and 8 come again, later
    write_lines(folder / "metrics.jsonl", [line | {"time": line["time"] + 100} for line in lines[6:]])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "train/lo')
    writer = RunWriter(RunFolder(folder), read_config(folder), store_uri(root))
    writer.send_lines()
    writer.send_lines()
    runs = stage_runs(root)
    assert runs["grpo-0"].info.status == "RUNNING"
    history = client_of(root).get_metric_history(runs["grpo-0"].info.run_id, "train/loss")
    assert [point.step for point in history] == list(range(1, 13))


def test_sync_rebuilds_the_store_and_changes_nothing_the_second_time(root):
    runfolders.build_all(root)
    (root / "not-a-run").mkdir()
    assert sync(root) == (8, [])
    version = client_of(root).get_model_version_by_alias("r1pipe", "grpo").version
    before = {name: run.data.metrics for name, run in stage_runs(root).items()}
    assert sync(root) == (8, [])
    assert {name: run.data.metrics for name, run in stage_runs(root).items()} == before
    assert len(before) == 8
    client = client_of(root)
    assert client.get_model_version_by_alias("r1pipe", "grpo").version == version
    grpo = stage_runs(root)["grpo-0"]
    assert len(client.get_metric_history(grpo.info.run_id, "eval/greedy")) == 1
    parent = grpo.data.tags["mlflow.parentRunId"]
    assert len(client.get_metric_history(parent, "stages/more/greedy")) == 5, (
        "one per evaluated stage of the recipe"
    )


def test_what_tripped_is_a_tag_with_its_likely_cause(root):
    """While the job runs, where it went back, and in a store that is made again from the run folder."""

    def tags() -> dict[str, str]:
        shown = stage_runs(root)["grpo-0"].data.tags
        return {key: text for key, text in shown.items() if key.startswith("tripwire.")}

    folder = build(root, "grpo", steps=4, finished=False)
    lines = [
        {"step": 2, "name": "kl", "message": "tripwire kl: 9.00 nats a token; lower stage.optim.lr"},
        {"step": 3, "name": "verifier", "message": "tripwire verifier: 5% failed"},
        {"step": 4, "name": "kl", "message": "tripwire kl: 7.00 nats a token; lower stage.optim.lr"},
    ]
    write_lines(folder / "tripwires.jsonl", lines)
    writer = RunWriter(RunFolder(folder), read_config(folder), store_uri(root))
    writer.send_lines()
    kl = "tripwire kl: {}.00 nats a token; lower stage.optim.lr"
    assert tags() == {
        "tripwire.kl": f"step 4: {kl.format(7)}",
        "tripwire.verifier": "step 3: tripwire verifier: 5% failed",
    }
    (folder / "tripwires.jsonl").write_text(json.dumps(lines[0]) + "\n")  # the job went back to step 2
    Mirror(folder, read_config(folder)).finish()
    assert tags() == {"tripwire.kl": f"step 2: {kl.format(9)}"}
    sync(root, rebuild=True)
    assert tags() == {"tripwire.kl": f"step 2: {kl.format(9)}"}


def test_a_dead_server_is_refused_in_one_line(tmp_path):
    folder = build(tmp_path, "grpo", uri="http://127.0.0.1:9")
    with pytest.raises(
        EnvironmentProblem, match=r"^no MLflow server at tracking\.uri=http://127\.0\.0\.1:9 .*tracking=none$"
    ):
        Mirror(folder, read_config(folder))


def test_a_store_that_cannot_open_is_refused_in_one_line_but_a_run_that_is_done_stays_done(tmp_path):
    folder = build(tmp_path, "grpo", uri=f"sqlite:///{tmp_path}/missing/folder/mlflow.db", finished=False)
    (tmp_path / "missing").write_text("a file where a folder should be")
    mirror = Mirror(folder, read_config(folder))
    with pytest.raises(EnvironmentProblem, match=r"tracking\.uri=sqlite") as caught:
        mirror.finish()
    assert "\n" not in str(caught.value)
    said: list[str] = []
    (folder / "record.json").write_text("{}")
    mirror = Mirror(folder, read_config(folder), said.append)
    mirror.poll()
    assert mirror.finish() is None
    assert len(said) == 1 and "the run is done" in said[0] and f"r1pipe sync root={tmp_path}" in said[0]


def test_a_failure_later_is_reported_once_and_made_good(root, monkeypatch):
    folder = build(root, "grpo", steps=4, finished=False)
    said: list[str] = []
    attempts: list[int] = []
    send, refused = RunWriter.send_lines, [True]

    def refuse(writer: RunWriter) -> None:
        attempts.append(1)
        if refused:
            raise OSError("the store is gone")
        send(writer)

    monkeypatch.setattr(RunWriter, "send_lines", refuse)
    monkeypatch.setattr("r1pipe.tracking.mirror.EVERY_S", 0.01)
    mirror = Mirror(folder, read_config(folder), said.append)
    eventually(lambda: len(attempts) > 2)
    for step in (5, 6):
        write_lines(folder / "metrics.jsonl", [{"step": step, "time": 3.0 * step, "train/loss": 0.1}])
    assert len(said) == 1 and "\n" not in said[0] and "training continues" in said[0]
    mirror.poll()
    refused.clear()
    mirror.finish()
    history = client_of(root).get_metric_history(stage_runs(root)["grpo-0"].info.run_id, "train/loss")
    assert [point.step for point in history] == [1, 2, 3, 4, 5, 6]


def test_without_tracking_nothing_is_made(tmp_path):
    folder = build(tmp_path, "grpo", enabled=False)
    mirror = Mirror(folder, read_config(folder))
    mirror.poll()
    assert mirror.finish() is None
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("models:/r1pipe@gpro", "known: models:/r1pipe@cold_start, models:/r1pipe@grpo"),
        ("models:/other@grpo", "none of this name"),
        ("models:/r1pipe", "write models:/NAME@ALIAS"),
        ("models:/a'b@x", "none of this name"),
        ("models:/a'b\"c@x", "none of this name"),
    ],
)
def test_an_unknown_model_is_named_with_the_known_ones(pipeline, address, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        resolve_model(address, pipeline)
    assert "\n" not in str(caught.value)


def test_a_store_that_is_not_there_is_not_made_by_asking(tmp_path):
    with pytest.raises(CheckpointError, match="no MLflow store"):
        resolve_model("models:/r1pipe@grpo", tmp_path)
    with pytest.raises(EnvironmentProblem, match="no MLflow store"):
        serve_ui(tmp_path, tracking(), 5000)
    with pytest.raises(EnvironmentProblem, match="open http://tracker:5000"):
        serve_ui(tmp_path, tracking("http://tracker:5000"), 5000)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_not_mlflow_is_refused(tmp_path):
    with replying((404, "<html>no such page</html>")) as server:
        folder = build(tmp_path, "grpo", finished=False, uri=server.url)
        with pytest.raises(EnvironmentProblem) as caught:
            Mirror(folder, read_config(folder)).finish()
        assert "\n" not in str(caught.value)


def test_names_and_limits():
    flat = flatten({"a": {"b": [1, 2], "c": None, "d": {}}, "long": "x" * 9000})
    assert flat | {"long": ""} == {"a.b": "[1, 2]", "a.c": "null", "a.d": "{}", "long": ""}
    assert len(flat["long"]) == 6000
    metrics = {
        "pass_at_1": 0.5,
        "pass_at_1_ci": [0.4, 0.6],
        "greedy": None,
        "by_task": {"word": {"pass_at_1": 0.7}},
    }
    assert final_metrics({"metrics": metrics}) == {
        "eval/pass_at_1": 0.5,
        "eval/pass_at_1_low": 0.4,
        "eval/pass_at_1_high": 0.6,
        "eval/word/pass_at_1": 0.7,
    }


def test_importing_is_light_and_a_mirror_is_quiet(root):
    folder = build(root, "grpo", steps=2)
    code = (
        "import sys; from r1pipe.tracking import Mirror; import json\n"
        "import r1pipe.cli.compare, r1pipe.launch.progress\n"
        "assert not {'mlflow', 'torch', 'matplotlib', 'pandas'} & set(sys.modules)\n"
        f"Mirror({str(folder)!r}, json.load(open({str(folder / 'config.json')!r}))).finish()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


def test_config_has_what_tracking_reads(tmp_path):
    assert set(config("grpo", tmp_path)["tracking"]) == {"enabled", "uri", "experiment", "model_name"}
