"""record.json names all that made a checkpoint, and each of it can be held against the files."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from jobs import tiny, write_run

from r1pipe.chat.template import Chat
from r1pipe.config import ParentRef, config_hash, load, to_mapping
from r1pipe.config.changes import Change
from r1pipe.core.chat_template import TEMPLATE
from r1pipe.core.errors import CheckpointError
from r1pipe.core.paths import SET_ASIDE, RunFolder, content_dir
from r1pipe.launch import command as launch
from r1pipe.runs import checkpoints, machine
from r1pipe.runs.files import write_json
from r1pipe.runs.lineage.fit import template_hash
from r1pipe.runs.provenance import FORMAT, job_record
from r1pipe.runs.record import edges, note, own_hash, read_record

MADE = {
    "wall_s": 1.5,
    "steps": 3,
    "seconds": {"update": 1.0},
    "data_hash": "da" * 32,
    "metrics": {"greedy": 0.5},
}


@pytest.fixture
def parent(tmp_path: Path) -> ParentRef:
    """A finished run's checkpoint, with its record."""
    run = RunFolder(tmp_path / "cold_start-s0-1")
    run.checkpoint(1).mkdir(parents=True)
    checkpoints.write_manifest(run.checkpoint(1))
    write_json(run.config, {"stage": {"name": "cold_start"}})
    write_json(run.record, {"record_hash": "the hash of the parent's record"})
    made = checkpoints.manifest_hash(run.checkpoint(1))
    return ParentRef("cold_start", run.run_id, str(run.checkpoint(1)), made)


def test_a_record_names_everything_and_everything_is_what_it_says(tmp_path: Path, parent: ParentRef) -> None:
    config = tiny("grpo", "seed=7", "tracking.uri='http://me:hunter2hunter2@host:5000'")
    config = replace(config, weights_from=parent, reads_from={"cold_start": parent})
    run = RunFolder(write_run(tmp_path / "grpo-s7-1", config))
    run.diff.write_text("+ a line\n")
    write_json(run.env, {"code": {"revision": "abc", "dirty": True}})
    note(run, [Change("stage.keep", 2, 5), Change("code.revision", "aaa", "abc")])
    note(run, [Change("stage.keep", 5, 3)])
    run.data.mkdir()
    (run.data / SET_ASIDE).write_text('{"line": 1}\n{"line": 2}\n')
    run.dataset.write_text("its hash is data_hash")
    run.metrics.write_text('{"step": 1}\n')
    run.rollouts.mkdir()
    (run.rollouts / "step-1.parquet").write_text("rows")
    checkpoint = run.checkpoint(3)
    checkpoint.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).write_bytes((content_dir() / "tokenizer" / name).read_bytes())
    checkpoints.write_manifest(checkpoint)
    chat = Chat.load(checkpoint)

    record = json.loads(json.dumps(job_record(run, config, checkpoint, chat, dict(MADE), "50" * 32)))
    write_json(run.record, record)
    assert read_record(run.record) == record, "what reads records takes it"
    assert (record["format"], record["run_id"], record["stage"], record["seed"]) == (
        FORMAT,
        "grpo-s7-1",
        "grpo",
        7,
    )
    edge = vars(parent) | {"record_hash": "the hash of the parent's record"}
    assert record["parents"] == {"weights": edge, "data": [edge]}
    assert [(kind, found) for kind, found, _ in edges(record["parents"])] == [
        ("weights", parent),
        ("data", parent),
    ]
    assert record["data"] == {
        "name": "world",
        "kind": "world",
        "path": None,
        "hash": "50" * 32,
        "set_aside": 2,
    }
    assert record["files"] == {
        "data/set_aside.jsonl": checkpoints.file_hash(run.data / SET_ASIDE),
        "metrics.jsonl": checkpoints.file_hash(run.metrics),
        "rollouts/step-1.parquet": checkpoints.file_hash(run.rollouts / "step-1.parquet"),
    }
    assert record["data_hash"] == MADE["data_hash"] and record["metrics"] == MADE["metrics"]
    assert record["config_hash"] == config_hash(config) == config_hash(load(record["config"]))
    assert record["config"]["tracking"]["uri"] == "http://host:5000", "resolved, but for the login"
    changed = {"tracking": None}
    assert to_mapping(config) | changed == record["config"] | changed
    assert record["history"] == {
        "file": "config_history.jsonl",
        "hash": checkpoints.file_hash(run.config_history),
        "changed": ["code.revision", "stage.keep"],
    }
    assert record["code"] == {
        "revision": "abc",
        "dirty": True,
        "diff": "code.diff",
        "diff_hash": hashlib.sha256(b"+ a line\n").hexdigest(),
    }
    assert (
        record["template_hash"] == template_hash(checkpoint) == hashlib.sha256(TEMPLATE.encode()).hexdigest()
    )
    assert record["tokenizer_hash"] == chat.tokenizer_hash
    assert record["checkpoint"] == "checkpoints/step-3"
    assert record["checkpoint_hash"] == checkpoints.manifest_hash(checkpoint)
    assert record["versions"] == machine.versions()
    assert record["record_hash"] == own_hash(record)


def test_the_launcher_writes_the_diff_beside_the_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "code_diff", lambda: "the diff\n")
    run = RunFolder(tmp_path / "runs" / "grpo-s0-1")
    launch.write_run_files(replace(tiny("grpo"), root=str(tmp_path / "runs")), run, [])
    assert run.diff.read_text() == "the diff\n"
    assert set(json.loads(run.env.read_text())["code"]) == {"revision", "dirty"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"stage": None}, "stage is wrong"),
        ({"metrics": {"by_task": {"word": {"greedy": "0.5"}}}}, r"metrics\.by_task\.word\.greedy is wrong"),
        ({"metrics": {"pass_at_1_ci": [0.5]}}, r"metrics\.pass_at_1_ci is wrong"),
        ({"seconds": {"update": True}}, r"seconds\.update is wrong"),
        ({"parents": {"data": [{"stage": "grpo"}]}}, r"parents\.data\.0\.run_id is missing"),
    ],
)
def test_a_damaged_record_names_file_key_and_remedy(tmp_path: Path, changes: dict, told: str) -> None:
    good = content_dir() / "base" / "record.json"
    assert read_record(good)["stage"] == "pretrain", "a record of an older version"
    path = tmp_path / "record.json"
    path.write_text(json.dumps(json.loads(good.read_text()) | changes))
    with pytest.raises(CheckpointError, match=told) as error:
        read_record(path)
    assert str(path) in str(error.value) and "run the stage again" in str(error.value)
