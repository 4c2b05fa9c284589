"""The way back from a checkpoint: both kinds of edge, every hash checked, and nothing that ends the walk."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from fakes import build_house

from r1pipe.cli.lineage import described, page
from r1pipe.config import ParentRef
from r1pipe.config.changes import Change, mapping_hash
from r1pipe.core.chat_template import with_system
from r1pipe.core.errors import CheckpointError
from r1pipe.core.paths import RunFolder
from r1pipe.runs import checkpoints, lineage
from r1pipe.runs import data_files as datafiles
from r1pipe.runs.record import note, own_hash, record_beside


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def ref(made: Path, stage: str) -> ParentRef:
    folder = made / "checkpoints" / "step-1"
    return ParentRef(stage, made.name, str(folder), checkpoints.manifest_hash(folder))


LEFT = ("metrics.jsonl", "samples.json", "rollouts/step-1.parquet", "data/funnel.json")  # by every run here


def made(
    root: Path,
    stage: str,
    weights: ParentRef | None = None,
    *reads: ParentRef,
    data: dict | None = None,
) -> Path:
    """A finished run's folder, as far as a lineage looks at it."""
    run = RunFolder(root / f"{stage}-s0-1")
    checkpoint = run.checkpoint(1)
    write(checkpoint / "config.json", {"vocab_size": 4})
    write(checkpoint / "tokenizer.json", {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": []})
    write(checkpoint / "tokenizer_config.json", {"chat_template": "{{ messages }}"})
    (checkpoint / "model.safetensors").write_text(stage)
    checkpoints.write_manifest(checkpoint)
    config = {
        "seed": 0,
        "pipeline": "mine",
        "stage": {"name": stage},
        "data": data or {"kind": "world"},
        "weights_from": vars(weights) if weights else None,
        "reads_from": {one.stage: vars(one) for one in reads},
    }
    write(run.config, config)
    write(run.evaluation, {"pass_at_1": 0.5})
    for name in (*LEFT, "data/samples.parquet"):
        write(run.path / name, stage)
    note(run, [Change("stage.keep", 2, 5)])

    def edge(parent: ParentRef) -> dict:
        theirs = record_beside(Path(parent.checkpoint))
        known = json.loads(theirs.read_text()) if theirs.exists() else {}
        return vars(parent) | {"record_hash": known.get("record_hash")}

    record = {
        "format": 2,
        "run_id": run.run_id,
        "stage": stage,
        "seed": 0,
        "pipeline": "mine",
        "created": "2026-01-01T10:00:00",
        "parents": {"weights": edge(weights) if weights else None, "data": [edge(one) for one in reads]},
        "config_hash": mapping_hash(config),
        "config": config,
        "data_hash": checkpoints.file_hash(run.dataset) if stage == "rejection_sft" else "da",
        "data": {"hash": datafiles.hashes(data)[0] if data else "da"},
        "files": {name: checkpoints.file_hash(run.path / name) for name in LEFT},
        "history": {
            "file": run.config_history.name,
            "hash": checkpoints.file_hash(run.config_history),
            "changed": ["stage.keep"],
        },
        "checkpoint": "checkpoints/step-1",
        "checkpoint_hash": checkpoints.manifest_hash(checkpoint),
        "template_hash": lineage.fit.template_hash(checkpoint),
        "metrics": {"pass_at_1": 0.5},
    }
    write(run.record, record | {"record_hash": own_hash(record)})
    return run.path


class Family:
    """base -> cold_start -> grpo -> (data) rejection_sft, which starts from the base again."""

    def __init__(self, root: Path):
        self.root = root
        self.base = made(root, "pretrain")
        self.cold = made(root, "cold_start", ref(self.base, "pretrain"))
        self.grpo = made(root, "grpo", ref(self.cold, "cold_start"))
        self.last = made(root, "rejection_sft", ref(self.base, "pretrain"), ref(self.grpo, "grpo"))

    def walk(self) -> list[lineage.Ancestor]:
        return list(lineage.ancestors(lineage.checkpoint_of_run(RunFolder(self.last))))

    def problems(self) -> dict[str, str]:
        return {one.parent.run_id: one.problem for one in self.walk() if one.problem}

    def edit(self, run: Path, name: str, **changes: object) -> None:
        path = run / name
        write(path, json.loads(path.read_text()) | changes)


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return Family(tmp_path / "runs")


def test_both_kinds_of_edge_are_walked_and_a_common_ancestor_is_shown_once(family):
    walk = family.walk()
    assert [(one.depth, one.edge, one.parent.stage, one.shown) for one in walk] == [
        (0, "", "rejection_sft", False),
        (1, "weights", "pretrain", False),
        (1, "data", "grpo", False),
        (2, "weights", "cold_start", False),
        (3, "weights", "pretrain", True),
    ]
    assert not any(one.problems for one in walk)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("checkpoints/step-1/model.safetensors", "model.safetensors is not what was saved"),
        ("checkpoints/step-1/tokenizer.json", "tokenizer.json is not what was saved"),
        ("checkpoints/step-1/manifest.json", "manifest.json is not valid JSON"),
        ("record.json", "record.json is not valid JSON"),
        ("config.json", "config.json is not valid JSON"),
    ],
)
def test_a_broken_file_of_an_ancestor_is_named(family, name, told):
    (family.cold / name).write_bytes(b"\x00broken")
    found = family.problems()
    assert list(found) == [family.cold.name] and told in found[family.cold.name]


def test_every_broken_file_is_named_not_just_the_first(family):
    for name in ("model.safetensors", "tokenizer.json"):
        (family.cold / "checkpoints/step-1" / name).write_text("x")
    assert family.problems()[family.cold.name].count("is not what was saved") == 2


@pytest.mark.parametrize("name", [*LEFT, "config_history.jsonl"])
def test_what_a_run_left_beside_its_checkpoints_is_checked(family, name):
    (family.cold / name).write_text("other")
    assert family.problems() == {family.cold.name: f"{family.cold / name} is not what was saved"}
    (family.cold / name).unlink()
    assert family.problems() == {family.cold.name: f"{family.cold / name} is missing"}


def test_a_changed_dataset_is_shown_where_it_was_made_and_on_the_edge_of_whoever_took_it(family):
    taker = made(family.root, "distill", ref(family.base, "pretrain"), ref(family.last, "rejection_sft"))
    dataset = RunFolder(family.last).dataset
    for change, told in (
        (lambda: dataset.write_text("other"), "is not what was saved"),
        (dataset.unlink, "is missing"),
    ):
        change()
        assert family.problems() == {family.last.name: f"{dataset} {told}"}
        walk = lineage.ancestors(lineage.checkpoint_of_run(RunFolder(taker)))
        assert [(one.edge, one.problem) for one in walk if one.problem] == [("data", f"{dataset} {told}")]


def test_files_that_data_was_read_from_are_checked_where_they_are(tmp_path):
    folder, names = tmp_path / "files", ("train.jsonl", "test.jsonl")
    for name in names:
        write(folder / name, {"question": name})
    sources = {"reasoning": [{"path": names[0]}], "general": [{"path": names[1]}]}
    data = {"kind": "files", "path": str(folder), **{kind: [] for kind in datafiles.KINDS}, **sources}
    run = RunFolder(made(tmp_path / "runs", "cold_start", data=data))

    def found() -> lineage.Ancestor:
        [one] = lineage.ancestors(lineage.checkpoint_of_run(run))
        return one

    assert not found().problems and not found().notes
    (folder / names[1]).write_text("other")
    assert found().problems == (f"{folder / names[0]} and 1 more: not the data that was read",)
    (folder / names[1]).unlink()
    assert found().notes == (f"{folder / names[1]}: not here to check",) and not found().problems
    assert found().notes[0] in described(found()).plain and found().notes[0] in page([found()])
    shutil.rmtree(folder)
    assert not found().problems and len(found().notes) == 1
    write(run.record, json.loads(run.record.read_text()) | {"config": {"data": {"kind": "files", "path": 3}}})
    assert "config cannot be read" in found().problem


def test_a_manifest_made_anew_for_other_weights_is_found_by_the_child(family):
    folder = family.cold / "checkpoints/step-1"
    (folder / "model.safetensors").write_text("other weights")
    checkpoints.write_manifest(folder)
    assert "has changed since its child was made from it" in family.problems()[family.cold.name]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"metrics": {"pass_at_1": 0.9}}, "was edited"),
        ({"config_hash": "00"}, "is not the config that"),
        ({"parents": {"weights": None, "data": []}}, "names other parents than"),
        ({"run_id": "grpo-s0-9"}, "is the record of another run"),
        ({"checkpoint": "../../elsewhere"}, "is not a file of"),
        ({"checkpoint_hash": "00"}, "names another checkpoint_hash"),
        ({"template_hash": "00"}, "has another template than"),
        ({"parents": [1, 2]}, "parents is wrong (Input should be a valid dictionary)"),
        ({"metrics": {"pass_at_1": "high"}}, "metrics.pass_at_1 is wrong (Input should be a valid number)"),
    ],
)
def test_an_edited_record_is_shown(family, changes, told):
    family.edit(family.cold, "record.json", **changes)
    assert told in family.problems()[family.cold.name]


def test_a_record_edited_with_its_own_hash_made_anew_is_found_by_the_child(family):
    family.edit(family.cold, "record.json", metrics={"pass_at_1": 0.9})
    family.edit(family.cold, "evaluation.json", pass_at_1=0.9)
    record = json.loads((family.cold / "record.json").read_text())
    family.edit(family.cold, "record.json", record_hash=own_hash(record))
    assert family.problems() == {
        family.cold.name: f"{family.cold / 'record.json'} has changed since its child was made from it"
    }


def test_an_edited_config_is_shown(family):
    family.edit(family.grpo, "config.json", seed=7)
    assert "is not the config that" in family.problems()[family.grpo.name]


def test_an_ancestor_that_is_gone_is_shown_and_the_rest_is_walked(family):
    shutil.rmtree(family.grpo)
    assert family.problems() == {family.grpo.name: f"{family.grpo / 'checkpoints/step-1'} is gone"}
    assert [one.parent.stage for one in family.walk()] == ["rejection_sft", "pretrain", "grpo"]


def test_a_root_that_was_moved_is_walked_where_it_is_now(family):
    moved = family.root.with_name("moved")
    family.root.rename(moved)
    walk = list(lineage.ancestors(lineage.checkpoint_of_run(RunFolder(moved / family.last.name))))
    assert len(walk) == 5 and not any(one.problems for one in walk)
    assert all(one.parent.checkpoint.startswith(str(moved)) for one in walk)


def test_of_a_copied_root_the_copy_is_checked(family):
    copy = family.root.with_name("copy")
    shutil.copytree(family.root, copy)
    start = lineage.checkpoint_of_run(RunFolder(copy / family.last.name))
    (family.cold / "checkpoints/step-1/model.safetensors").unlink()
    assert not any(one.problems for one in lineage.ancestors(start))
    broken = copy / family.grpo.name / "checkpoints/step-1/model.safetensors"
    broken.write_text("other")
    found = [one.problem for one in lineage.ancestors(start) if one.problems]
    assert found == [f"{broken} is not what was saved"]


def test_weights_that_were_imported_are_found_in_a_copied_root(tmp_path):
    imported = tmp_path / "runs" / "imported" / "theirs"
    shutil.copytree(made(tmp_path, "pretrain") / "checkpoints/step-1", imported)
    run = made(tmp_path / "runs", "cold_start", lineage.checkpoint_of_folder(imported))
    shutil.copytree(tmp_path / "runs", tmp_path / "copy")
    shutil.rmtree(tmp_path / "runs")
    walk = list(lineage.ancestors(lineage.checkpoint_of_run(RunFolder(tmp_path / "copy" / run.name))))
    assert [one.problem for one in walk] == ["", ""]
    assert walk[1].parent.checkpoint == str(tmp_path / "copy" / "imported" / "theirs")


def test_a_circle_is_a_problem_and_ends(family):
    back = {"weights": vars(ref(family.last, "rejection_sft")), "data": []}
    family.edit(family.base, "record.json", parents=back)
    family.edit(family.base, "config.json", weights_from=back["weights"])
    assert "is its own ancestor" in family.problems()[family.last.name]
    assert "is its own ancestor" in page(family.walk())


def test_many_ways_to_one_ancestor_take_no_time(tmp_path):
    one = made(tmp_path, "s0")
    for n in range(1, 40):  # 2 ** 40 ways
        parent = ref(one, f"s{n - 1}")
        one = made(tmp_path, f"s{n}", parent, replace(parent, stage="again"))
    assert len(list(lineage.ancestors(lineage.checkpoint_of_run(RunFolder(one))))) == 1 + 2 * 39


def test_a_record_of_an_older_version_is_walked(family):
    record = json.loads((family.cold / "record.json").read_text())
    for key in ("format", "record_hash", "template_hash", "config", "data", "files"):
        record.pop(key)
    write(family.cold / "record.json", record)
    grpo = json.loads((family.grpo / "record.json").read_text())
    grpo["parents"]["weights"].pop("record_hash")
    grpo.pop("record_hash")
    write(family.grpo / "record.json", grpo)
    last = json.loads((family.last / "record.json").read_text())
    last["parents"]["data"][0].pop("record_hash")
    write(family.last / "record.json", last | {"record_hash": own_hash(last)})
    assert family.problems() == {}


def test_a_checkpoint_of_an_unfinished_run_has_the_edges_of_its_config(family):
    (family.last / "record.json").unlink()
    start = lineage.checkpoint_of_folder(family.last / "checkpoints/step-1")
    assert [one.parent.stage for one in lineage.ancestors(start)][:3] == ["rejection_sft", "pretrain", "grpo"]


def test_the_page_stands_alone_and_has_every_edge_and_problem(family):
    (family.cold / "checkpoints/step-1/model.safetensors").write_text("<script>alert(1)</script>")
    html = page(family.walk())
    assert html.count('<li class="weights"') == 3 and html.count('<li class="data"') == 1
    assert html.count("<section") == 4 and html.count('class="broken"') == 1
    assert "model.safetensors is not what was saved" in html
    assert "http" not in html.replace("http-equiv", "") and "<script" not in html


def test_the_command_draws_both_and_ends_with_1_where_something_is_wrong(tmp_path, monkeypatch, capsys):
    house = build_house(tmp_path, monkeypatch)
    house.call("run", "stage=cold_start")
    house.call("run", "stage=grpo")
    html = tmp_path / "lineage.html"
    assert house.call("lineage", "grpo", "--html", str(html)) == 0
    assert html.read_text().count("<section") == 3
    (house.runs("cold_start")[0] / "checkpoints/step-1/model.safetensors").unlink()
    capsys.readouterr()
    assert house.call("lineage", "grpo", "--html", str(html)) == 1
    out, err = capsys.readouterr()
    assert "model.safetensors is missing" in out and err == ""
    assert "model.safetensors is missing" in html.read_text()
    assert house.call("lineage", "grpo", "--html", str(tmp_path / "no/such/folder.html")) == 2
    assert "give another --html" in capsys.readouterr().err


# what does not fit


def test_parents_with_other_tokens_or_templates_are_refused_in_one_line(family):
    for name, content, told in (
        ("tokenizer.json", {"model": {"vocab": {"b": 0, "a": 1}}}, "has another tokenizer than"),
        ("tokenizer_config.json", {"chat_template": "other"}, "has another chat template than"),
        ("tokenizer.json", {"model": {"vocab": {"a": 9}}}, r"has token 9, but .* has vocab_size=4"),
        ("tokenizer.json", {"model": 3}, "the vocabulary cannot be read"),
        ("tokenizer_config.json", {}, "has no chat_template"),
    ):
        path = family.grpo / "checkpoints/step-1" / name
        before = path.read_text()
        write(path, content)
        with pytest.raises(CheckpointError, match=told) as caught:
            lineage.fit.check_same_chat_format(ref(family.base, "pretrain"), [ref(family.grpo, "grpo")])
        assert "\n" not in str(caught.value)
        path.write_text(before)
    path = family.grpo / "checkpoints/step-1/tokenizer_config.json"
    write(path, {"chat_template": with_system("{{ messages }}", "Be brief.")})
    parents = ref(family.base, "pretrain"), [ref(family.grpo, "grpo")]
    with pytest.raises(CheckpointError, match=r"another system prompt than .*give chat\.system=TEXT"):
        lineage.fit.check_same_chat_format(*parents)
    for system in ("", "Else."):
        lineage.fit.check_same_chat_format(*parents, system)
    (family.base / "checkpoints/step-1/tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing: a stage cannot start"):
        lineage.fit.check_same_chat_format(
            ParentRef("base", "b", str(family.base / "checkpoints/step-1"), ""), []
        )
