"""Distillation: a student of another shape learns from stage 3's samples alone, and its lineage says so.

Exact resume after a kill is in tests/test_resume.py, where every stage that trains is.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import House
from tiny_runs import load_stage, tiny_run

from r1pipe.chat.template import Chat
from r1pipe.config import DistillConfig, ParentRef, read_config
from r1pipe.config.compose import compose
from r1pipe.core.paths import RunFolder
from r1pipe.data.packing import Packed
from r1pipe.doctor import Context, examine
from r1pipe.doctor.context import limits
from r1pipe.runs import checkpoints, lineage
from r1pipe.runs.findings import PASS
from r1pipe.train.run import Run
from r1pipe.train.sft import loop
from r1pipe.train.sft.rejection import read_dataset

STUDENT = "model.hidden_size=16"
DISTILL = ["stage=distill", STUDENT, "stage.max_steps=0", "stage.epochs=12", "stage.batch_size=2"]
RATE = ["stage.optim.lr=0.02", "stage.optim.min_lr=0.002"]


def finished(folder: Path, *words: str, weights: ParentRef | None = None, **reads: ParentRef) -> RunFolder:
    """The run of a tiny stage, in this process."""
    tiny_run(folder, *words, weights=weights, **reads)
    stage = next(word for word in words if word.startswith("stage="))
    load_stage(stage.removeprefix("stage=")).main(str(folder))
    return RunFolder(folder)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run of rejection sampling that keeps what the bundled base solves."""
    folder = tmp_path_factory.mktemp("teacher") / "rejection_sft-s0-1"
    return finished(
        folder, "stage=rejection_sft", "stage.max_steps=1", "data.tasks=[program]", grpo=lineage.bundled()
    )


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> ParentRef:
    folder = tmp_path_factory.mktemp("student") / "pretrain-s0-1"
    return lineage.checkpoint_of_run(finished(folder, "stage=pretrain", STUDENT, "stage.max_steps=1"))


@pytest.fixture(scope="module")
def distilled(
    teacher: RunFolder, student: ParentRef, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunFolder, list[Packed]]:
    """The run, and the rows that it trained on."""
    trained: list[Packed] = []

    def spy(run: Any, rows: list[Packed], batch_size: int, whole: Callable = loop.epochs_of) -> Any:
        trained.extend(rows)
        return whole(run, rows, batch_size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "epochs_of", spy)
        folder = tmp_path_factory.mktemp("distilled") / "distill-s0-1"
        run = finished(
            folder, *DISTILL, *RATE, weights=student, rejection_sft=lineage.checkpoint_of_run(teacher)
        )
    return run, trained


def test_the_student_learns_the_responses_of_the_samples_and_nothing_else(
    teacher: RunFolder, distilled: tuple[RunFolder, list[Packed]]
) -> None:
    run, rows = distilled
    demonstrations, _ = read_dataset(teacher.dataset)
    assert {trace.source.partition(":")[0] for trace in demonstrations} == {"sampled", "world"}, "both parts"
    chat = Chat.load(run.checkpoint(steps_of(run)))
    learned = [
        token for row in rows for token, is_learned in zip(row.tokens, row.loss, strict=True) if is_learned
    ]
    answers = [[*chat.encode(trace.response), chat.eos_id] for trace in demonstrations]
    assert sorted(learned) == sorted(token for answer in answers for token in answer)
    assert sum(len(row.tokens) for row in rows) > len(learned), "prompts are there, and masked"
    losses = [json.loads(line)["train/loss"] for line in run.metrics.read_text().splitlines()]
    assert losses[-1] < losses[0] - 1


def steps_of(run: RunFolder) -> int:
    return int(json.loads(run.record.read_text())["steps"])


def test_its_lineage_has_the_student_and_the_samples(
    teacher: RunFolder, student: ParentRef, distilled: tuple[RunFolder, list[Packed]]
) -> None:
    run, _ = distilled
    record, theirs = (json.loads(one.record.read_text()) for one in (run, teacher))
    assert record["data_hash"] == theirs["data_hash"] == checkpoints.file_hash(teacher.dataset)
    (data,) = record["parents"]["data"]
    assert (data["run_id"], data["record_hash"]) == (teacher.run_id, theirs["record_hash"])
    assert record["parents"]["weights"]["hash"] == student.hash
    walk = list(lineage.ancestors(lineage.checkpoint_of_run(run)))
    assert [one.problems for one in walk] == [()] * len(walk)
    edges = [(one.edge, one.parent.stage) for one in walk if one.depth == 1]
    assert edges == [("weights", "pretrain"), ("data", "rejection_sft")]


def test_the_doctor_looks_at_the_samples(
    teacher: RunFolder, distilled: tuple[RunFolder, list[Packed]], tmp_path: Path
) -> None:
    run = RunFolder(tmp_path)
    config = read_config(distilled[0].config)
    context = Context(Run(run, config, config.stage), replace(limits(), judged=4))
    assert context.demonstrations == read_dataset(teacher.dataset)[0]
    found = {finding.name: finding for finding in examine(context)}
    assert "variance" not in found
    assert not [finding for finding in found.values() if finding.status != PASS]


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"PAR1"), Path.unlink])
def test_damaged_samples_are_refused_and_the_lineage_names_them(
    damage: Callable[[Path], object],
    teacher: RunFolder,
    student: ParentRef,
    distilled: tuple[RunFolder, list[Packed]],
    tmp_path: Path,
) -> None:
    for run in (teacher, distilled[0]):  # in one root, as runs of a pipeline lie
        shutil.copytree(run.path, tmp_path / run.run_id)
    copy = RunFolder(tmp_path / teacher.run_id)
    damage(copy.dataset)
    walk = lineage.ancestors(lineage.checkpoint_of_run(copy))
    assert str(copy.dataset) in next(walk).problem
    folder = tiny_run(
        tmp_path / "again", *DISTILL, weights=student, rejection_sft=lineage.checkpoint_of_run(copy)
    )
    with pytest.raises(SystemExit) as ended:
        load_stage("distill").main(str(folder))
    told = (folder / "error.txt").read_text()
    assert ended.value.code == 2 and told.count("\n") == 1
    assert str(copy.dataset) in told and "r1pipe run stage=rejection_sft" in told


def test_a_stage_without_samples_is_refused(student: ParentRef, tmp_path: Path) -> None:
    folder = tiny_run(tmp_path / "run", *DISTILL, weights=student, pretrain=student)
    with pytest.raises(SystemExit):
        load_stage("distill").main(str(folder))
    assert "name a stage that samples in stage.reads" in (folder / "error.txt").read_text()


def test_the_papers_values() -> None:
    stage = compose(["stage=distill", "recipe=cluster"]).config.stage
    assert isinstance(stage, DistillConfig)
    assert (stage.starts_from, stage.reads) == ("base", ["rejection_sft"])
    assert (stage.epochs, stage.batch_size, stage.optim.schedule) == (2, 64, "cosine")
    assert stage.optim.min_lr == pytest.approx(stage.optim.lr / 10)


# --- from the command line


@pytest.fixture
def pipeline(house: House) -> House:
    """A house with a finished rejection_sft, and a student of half the width in a pipeline of its own."""
    for stage in ("cold_start", "grpo", "rejection_sft"):
        assert house.call("run", f"stage={stage}") == 0
    assert house.call("run", "stage=pretrain", "model=student", "pipeline=student") == 0
    return house


def test_by_default_the_pipelines_base_is_the_student_and_parent_names_another(pipeline: House) -> None:
    (student,) = pipeline.runs("pretrain")
    (teacher,) = pipeline.runs("rejection_sft")
    for words, run_id in ([], "bundled"), (["model=student", f"parent={student.name}"], student.name):
        assert pipeline.call("run", "stage=distill", *words) == 0
        config = json.loads((pipeline.runs("distill")[-1] / "config.json").read_text())
        assert config["weights_from"]["run_id"] == run_id
        assert config["reads_from"]["rejection_sft"]["run_id"] == teacher.name


def test_without_samples_one_line_says_how_to_get_them(house: House, capsys: pytest.CaptureFixture) -> None:
    assert house.call("run", "stage=distill") == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "rejection_sft has no finished run" in told
    assert "r1pipe run stage=rejection_sft" in told
    assert "parent=" not in told, "that would name the student"


@pytest.mark.parametrize(
    ("file", "key", "value", "told"),
    [
        ("tokenizer.json", "model", {"vocab": {"a": 0, "b": 1}}, "has another tokenizer than"),
        ("tokenizer.json", "model", {"vocab": {"a": 5000}}, "has vocab_size=1152"),
        ("tokenizer_config.json", "chat_template", "{{ other }}", "has another chat template than"),
        ("config.json", "hidden_size", 128, "has hidden_size=128, but the config has"),
    ],
)
def test_a_student_that_does_not_fit_is_refused(
    pipeline: House, capsys: pytest.CaptureFixture, file: str, key: str, value: object, told: str
) -> None:
    checkpoint = pipeline.runs("pretrain")[0] / "checkpoints" / "step-1"
    content = json.loads((checkpoint / file).read_text())
    (checkpoint / file).write_text(json.dumps(content | {key: value}))
    checkpoints.write_manifest(checkpoint)
    capsys.readouterr()
    assert pipeline.call("run", "stage=distill", "model=student", f"parent={checkpoint}") == 2
    line = capsys.readouterr().err
    assert told in line and line.count("\n") == 1 and not pipeline.runs("distill")
