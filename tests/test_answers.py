"""Final answers: tests/cases/answers.jsonl by kind, votes, speed."""

import json
import time
from collections import defaultdict
from pathlib import Path

import pytest

from r1pipe.core.errors import DataError
from r1pipe.core.types import Completion, Prompt, Score, Status
from r1pipe.rewards import check_gold, score_all, votes
from r1pipe.rewards.accuracy import gold_of
from r1pipe.rewards.answers.gold import Form, read_gold

CASES = Path(__file__).parent / "cases/answers.jsonl"


def cases():
    by_kind = defaultdict(list)
    for line in CASES.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        by_kind[row["kind"]].append(row)
    return by_kind


def prompt_of(gold, language="en", **checker):
    return Prompt("case", "file", language, "?", gold, checker)


def answered(summary):
    return Completion([1], [0.0], "stop", f"<think>\nx\n</think>\n\n{summary}")


def result(prompt, completion):
    """The reward, "refused" for a gold answer that cannot be one, or the status of a failure."""
    try:
        check_gold(prompt)
    except DataError:
        return "refused"
    [scores] = score_all([prompt], [completion], ["accuracy"])
    score = scores["accuracy"]
    return score.value if score.status is Status.SCORED else str(score.status)


@pytest.mark.parametrize("kind", cases())
def test_answers_of_each_kind(kind):
    rows = cases()[kind]
    got = [result(prompt_of(row["gold"], row["language"]), answered(row["summary"])) for row in rows]
    wrong = [
        (row["gold"], row["summary"], value)
        for row, value in zip(rows, got, strict=True)
        if value != row["expected"]
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("gold", "form"),
    [
        ("42", "number"), ("-3/4", "number"), ("25%", "number"), ("15 km/h", "quantity"),
        ("18 apples", "quantity"),
        (r"2\sqrt{3}", "expression"), ("x^2-1", "expression"), ("3x+6y-9=0", "equation"), ("x=5", "equation"),
        ("(1, 2)", "tuple"), (r"\{1, 2\}", "set"), ("[0, 1)", "interval"), ("x > 3", "interval"),
        (r"(-\infty,-1)\cup(2,\infty)", "interval"), ("2 or 5", "list"), (r"\pm 15", "list"), ("B", "choice"),
        ("A, C", "choice"), ("true", "boolean"), ("2024-03-05", "date"), ("11:30", "date"), ("3:2", "ratio"),
        ("north", "text"), ("无解", "text"), ("The sequence is convergent.", "text"), ("HHTT", "text"),
    ],
)  # fmt: skip
def test_a_gold_answer_has_one_form(gold, form):
    assert read_gold(gold).form == form


def test_a_row_names_the_form():
    assert read_gold("B", "text").form is Form.TEXT
    assert result(prompt_of("AC", answer_form="expression"), answered(r"\boxed{CA}")) == 1.0
    assert result(prompt_of("AC", answer_form="text"), answered(r"\boxed{CA}")) == 0.0
    with pytest.raises(DataError, match="the answer's form txet is unknown; did you mean text"):
        read_gold("B", "txet")
    with pytest.raises(DataError, match="is no date"):
        read_gold("12", "date")


def test_alternatives_and_options():
    number = prompt_of("5", alternatives=["five", "5!"])
    said = [answered(f"The answer is {text}.") for text in ("5", "five", "120", "6")]
    assert [result(number, completion) for completion in said] == [1, 1, 1, 0]
    several = prompt_of("Nelson", alternatives=["Horatio Nelson"])
    assert result(several, answered("The answer is Horatio Nelson.")) == 1.0
    assert result(several, answered("The answer is Napoleon.")) == 0.0
    options = prompt_of("B", options={"A": "Paris", "B": "Rome"})
    assert result(options, answered("The answer is Rome.")) == 1.0
    assert result(options, answered("The answer is Paris.")) == 0.0


@pytest.mark.parametrize(
    ("gold", "same", "other"),
    [
        ("B", ["B", "(B)", "B. 12", "option B"], "C"),
        ("(1,2)", ["(1,2)", r"\left(1, 2\right)", "(1, 2)"], "(2,1)"),
        ("5 m", ["5 m", "5 meters", "500 cm"], "5 km"),
        ("2, 3", ["2, 3", "3 and 2", r"\{2,3\}"], "2, 4"),
        ("0.5", ["0.5", "1/2", r"\frac{1}{2}", "½"], "0.25"),
        ("yes", ["yes", "Yes", "true"], "no"),
        ("north", ["north", "North"], "south"),
        ("x+1", ["x+1", "1 + x", r"\frac{2x+2}{2}"], "x+2"),
        ("x+1", ["x+2", "2+x"], "x+1"),
        (r"2\sqrt{3}", [r"2\sqrt{3}", r"\sqrt{12}", "2*sqrt(3)"], r"3\sqrt{2}"),
        ("y=2x+1", ["y=2x+1", "y = 1 + 2x", "2x - y + 1 = 0"], "y=2x-1"),
    ],
)
def test_equal_answers_are_one_vote(gold, same, other):
    prompt = prompt_of(gold)
    texts = [answered(rf"\boxed{{{answer}}}").text for answer in (*same, other)]
    *equal, another, none = votes(prompt, [*texts, answered("I do not know.").text])
    assert len({*equal}) == 1 and another not in equal
    assert "" not in (*equal, another) and none == ""


def test_a_thought_states_no_answer():
    thought = Completion([1], [0.0], "stop", r"<think>\boxed{5}</think>" + "\n\nI do not know.")
    assert result(prompt_of("5"), thought) == 0.0


def test_repaired_golds_are_what_was_meant():
    assert gold_of(prompt_of("\frac{1}{2}")).text == r"\frac{1}{2}"
    assert gold_of(prompt_of("ext{Yes}")).text == "Yes"
    assert gold_of(prompt_of("Work it out.\n#### 18")).text == "18"


def test_plain_checks_are_fast():
    """2,000 a second on two cores; here only that none is slower by an order of magnitude."""
    prompts = [prompt_of(str(i)) for i in range(2000)]
    completions = [answered(f"The answer is ${i}$ apples.") for i in range(2000)]
    began = time.process_time()
    scores = score_all(prompts, completions, ["accuracy"])
    assert time.process_time() - began < 30
    assert all(row["accuracy"] == Score(1.0) for row in scores)
