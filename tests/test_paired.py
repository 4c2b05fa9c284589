"""`r1pipe compare A B --paired`: differences, intervals and verdicts by hand; and what is refused."""

import json
import math
from pathlib import Path

import pytest
from runfolders import build
from typer.testing import CliRunner

from r1pipe.cli.commands import app
from r1pipe.core.errors import CheckpointError, ConfigError
from r1pipe.core.paths import RunFolder
from r1pipe.runs.paired import compare
from r1pipe.runs.problems import GREEDY, question_hash, read_problems
from r1pipe.runs.results import StoredRun
from r1pipe.train.evaluation.verdicts import write

A = {"p1": (True, True), "p2": (True, False), "p3": (False, False), "p4": (True, True)}
B = {"p1": (True, False), "p2": (False, True), "p3": (True, False), "p4": (False, False)}


def evaluated(
    root: Path, name: str, drawn: dict[str, tuple], greedy: dict[str, bool] | None = None, question="{}?"
) -> StoredRun:
    folder = RunFolder(build(root, "evaluate", run_id=name))
    rows = [
        {"prompt_id": problem, "question": question.format(problem), "draw": draw, "correct": correct}
        for problem, verdicts in drawn.items()
        for draw, correct in [*enumerate(verdicts), *([(GREEDY, greedy[problem])] if greedy else [])]
    ]
    write(folder.completions, [row | {"question_hash": question_hash(row["question"])} for row in rows])
    return StoredRun.read(folder)


def test_difference_interval_wins_and_losses(tmp_path: Path) -> None:
    found = compare(evaluated(tmp_path, "a", A), evaluated(tmp_path, "b", B))
    differences = [0.5, 0.0, -0.5, 1.0]
    assert [pair.difference for pair in found.pairs] == differences
    assert (found.mean("a"), found.mean("b"), found.mean("difference")) == (0.625, 0.375, 0.25)
    deviation = math.sqrt(sum((d - 0.25) ** 2 for d in differences) / 3)
    half = 1.959964 * deviation / 2
    assert found.interval == pytest.approx([0.25 - half, 0.25 + half])
    assert [pair.prompt_id for pair in found.won] == ["p4", "p1"]
    assert [pair.prompt_id for pair in found.lost] == ["p3"]
    values = found.as_object()
    assert (values["wins"], values["losses"], values["ties"], values["notes"]) == (2, 1, 1, [])


def test_the_other_way_round_is_the_same_with_another_sign(tmp_path: Path) -> None:
    a, b = evaluated(tmp_path, "a", A), evaluated(tmp_path, "b", B)
    one, other = compare(a, b), compare(b, a)
    assert one.interval and other.interval
    assert [-bound for bound in other.interval[::-1]] == pytest.approx(one.interval)
    assert [pair.prompt_id for pair in one.won] == [pair.prompt_id for pair in other.lost]


def test_a_pair_is_surer_than_two_evaluations_apart(tmp_path: Path) -> None:
    """Both solve the same half of the problems, and A one more of them."""
    a = {f"p{n}": (n < 50,) for n in range(100)}
    b = a | {"p0": (False,)}
    found = compare(evaluated(tmp_path, "a", a), evaluated(tmp_path, "b", b))
    assert found.interval and found.interval[1] - found.interval[0] < 0.05  # unpaired: .28


def test_without_spread_there_is_no_interval(tmp_path: Path) -> None:
    a = evaluated(tmp_path, "a", A)
    same = compare(a, evaluated(tmp_path, "b", A))
    assert same.mean("difference") == 0 and same.interval is None and not same.won
    alone = compare(evaluated(tmp_path, "c", {"p": (True,)}), evaluated(tmp_path, "d", {"p": (False,)}))
    assert alone.interval is None and len(alone.won) == 1


def test_unscored_samples_do_not_count_and_unscored_problems_are_left_out(tmp_path: Path) -> None:
    a = evaluated(tmp_path, "a", A | {"p1": (True, None), "p2": (None, None)})
    found = compare(a, evaluated(tmp_path, "b", B))
    assert [pair.a for pair in found.pairs] == [1.0, 0.0, 1.0] and found.unscored == 1
    greedy = dict.fromkeys(A, True)
    assert [p.share for p in read_problems(a.folder)] == [1.0, None, 0.0, 1.0]
    alone = evaluated(tmp_path, "e", dict.fromkeys(A, ()), greedy)
    assert [p.share for p in read_problems(alone.folder)] == [1.0] * 4


def test_other_problems_or_another_prompt_are_refused(tmp_path: Path) -> None:
    a, fewer = evaluated(tmp_path, "a", A), evaluated(tmp_path, "b", {"p1": (True,)})
    with pytest.raises(CheckpointError, match=r"^a and b were not asked the same problems \(4 and 1, 1 of"):
        compare(a, fewer)
    other = evaluated(tmp_path, "c", A, question="Solve {}.")
    with pytest.raises(CheckpointError, match=r"\(4 and 4, 0 of them in both\); evaluate both with the same"):
        compare(a, other)


def test_a_run_without_completions_or_with_a_damaged_file_is_refused(tmp_path: Path) -> None:
    a, without = evaluated(tmp_path, "a", A), StoredRun.read(RunFolder(build(tmp_path, "evaluate")))
    with pytest.raises(CheckpointError, match=r"has no evaluation.parquet.*r1pipe eval evaluate-0"):
        compare(a, without)
    a.folder.completions.write_bytes(b"PAR1 no")
    with pytest.raises(CheckpointError, match=r"evaluation.parquet cannot be read"):
        compare(a, a)


def call(*words: str) -> str:
    result = CliRunner().invoke(app, ["compare", *words], env={"COLUMNS": "200"})
    if result.exception:
        raise result.exception
    return result.output


def test_the_command_line(tmp_path: Path) -> None:
    evaluated(tmp_path, "a", A)
    b = evaluated(tmp_path, "b", B)
    config = json.loads(b.folder.config.read_text())
    b.folder.config.write_text(json.dumps(config | {"seed": 3}))
    said = call("a", "b", f"root={tmp_path}", "--paired")
    assert "A - B: +25.0 points, 95% interval -38.3 to +88.3 (normal, over the" in said
    assert "A is better on 2 of 4 problems, B on 1; alike on 1" in said
    assert "note: the evaluations differ in seed: 0 and 3" in said
    assert "A won (A, B):\n  100.0%   0.0%  p4  p4?" in said
    found = json.loads(call("a", "b", f"root={tmp_path}", "--paired", "--json"))
    assert found["won"][0] == {"prompt_id": "p4", "question": "p4?", "a": 1.0, "b": 0.0}
    with pytest.raises(ConfigError, match="--paired compares two runs, and 1 are named"):
        call("a", f"root={tmp_path}", "--paired")
