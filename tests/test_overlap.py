"""Decontamination: what counts as a copy of an evaluation question, in filters and doctor alike."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from test_filters import CONFIG

from r1pipe.core.types import Completion, Demonstration, Message, Prompt, Score
from r1pipe.data.overlap import ShortQuestions, key, user_text, words
from r1pipe.doctor.context import Context, RowSet, limits
from r1pipe.doctor.data import overlap
from r1pipe.runs.findings import FAIL, PASS
from r1pipe.train.sft.filters import Sampled, apply_filters

LONG = "A train leaves the station at noon with {} travellers and a cook, and stops at every second town."
PAIRS = [  # evaluated, trained on, whether it is a copy
    ("What is 2 + 2?", "what is 2+2", True),
    ("What is 3+4?", "What is 3+5?", False),
    ("What is 3+4?", "What is 3-4?", False),
    ("What is 3+4?", "What is 4+3?", False),
    ("What is 3+4?", "What is 3+4+5?", False),
    ("What is -5 + 3?", "What is 5 + 3?", False),
    ("What is 3+4?", "Question 5: What is 3+4? Show your work.", True),
    (r"Compute $\dfrac{1}{2}+\frac13$.", r"compute \(\frac{1}{2} + \tfrac{1}{3}\)", True),
    (r"Compute $\frac{1}{2}$ of 10.", "Compute 1/2 of 10", True),
    (r"Find $\left(3\cdot 4\right)^2$ now.", "find (3 × 4)^2, now", True),
    (r"A pool holds $1{,}200\text{ litres}$. How long?", "A pool holds 1200 litres: how long", True),
    ("How many apples do Tom and Ann have?", "How many apples do Tom and Ann have altogether?", True),
    ("Which neighbour of France is largest?", "Which neighbor of France is largest?", True),
    ("Which neighbour of France is largest?", "Which neighbour of Spain is largest?", False),
    ("Keep the numbers below 9, then add them.", "Keep the numbers below 9, then count them.", False),
    ("Write f(x): multiply by 7.", "Write f(x): multiply by 7, then add 1.", False),
    ("Tom has 3 pens and buys 4.", "Tom has 5 pens and buys 6.", False),
    ("Why?", "Why? Give three reasons.", False),
    ("小明有3个苹果，又买了4个，共几个？", "小明有3个苹果 又买了4个 共几个", True),
    ("小明有3个苹果，又买了4个，共几个？", "小明有5个苹果，又买了6个，共几个？", False),
    ("计算3+4。", "请先读题。计算3+4。写出过程。", True),
    (LONG.format(30), LONG.format(30).replace(",", " –").upper(), True),
    (LONG.format(30), "Think hard. " + LONG.format(30) + " Who drives it?", True),
]


def kept_by_the_filter(evaluated: str, trained: str) -> bool:
    text = "<think>\nWe add them.\n</think>\n\nThe answer is 7."
    row = Sampled(
        Prompt("p", "word", "en", trained, "7"),
        Completion([1], [0.0], "stop", text),
        {"accuracy": Score(1.0)},
    )
    kept, funnel = apply_filters([row], replace(CONFIG, ngram_overlap=10), [evaluated])
    assert kept or next(step["dropped"] for step in funnel if step["name"] == "overlap with evaluation")
    return bool(kept)


def told_by_the_doctor(evaluated: str, trained: str) -> tuple[str, str]:
    def rows(question: str) -> RowSet:
        return RowSet([Demonstration(Prompt("p", "word", "en", question), "", source="file:1")], "rows")

    context = SimpleNamespace(
        training_rows=rows(trained),
        limits=limits(),
        held_out=[],
        config=SimpleNamespace(stage=SimpleNamespace(eval=SimpleNamespace(split="test"))),
        row_set=lambda split, drawn: rows(evaluated),
        data=SimpleNamespace(rows=lambda split: []),
    )
    status, value, _ = overlap(cast(Context, context))
    return status, value


@pytest.mark.parametrize(("evaluated", "trained", "is_copy"), PAIRS)
def test_filters_and_doctor_find_the_same_copies(evaluated: str, trained: str, is_copy: bool) -> None:
    assert kept_by_the_filter(evaluated, trained) != is_copy
    assert told_by_the_doctor(evaluated, trained)[0] == (FAIL if is_copy else PASS)


def test_words_are_what_is_compared() -> None:
    assert words("Tom's 3-digit **number**, (x-1) = -5!") == [
        *("tom", "s", "3", "digit", "number", "x", "-", "1", "=", "-", "5")
    ]
    assert key("先算 $3\\times 4$，再加1.50。") == "先 算 3 * 4 再 加 1.50"
    assert key("?!") == ""


def test_what_a_user_said_before_is_part_of_the_question() -> None:
    context = (Message("system", "Be brief."), Message("user", "I have 3."), Message("assistant", "I see."))
    assert user_text(Prompt("p", "word", "en", "And 4 more?", context=context)) == "I have 3.\nAnd 4 more?"


def test_questions_without_a_word_or_as_long_as_an_n_gram_are_not_short() -> None:
    short = ShortQuestions(["", "?!", "one two three four five", "one two three four"], 5)
    assert short.copied_by("one two three four five") == set()
    assert short.copied_by("One two three. Four.") == {3}
    found: Any = short.copied_by("")
    assert found == set()
