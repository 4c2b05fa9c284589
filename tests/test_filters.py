"""Rejection sampling's filters, each with a row that it alone drops."""

import dataclasses

import pytest

from r1pipe.config import FilterConfig
from r1pipe.core.types import Completion, Prompt, Score, Status
from r1pipe.train.sft.filters import FILTERS, Sampled, apply_filters, distinctive_grams, repetition, words

CONFIG = FilterConfig(
    max_paragraph=30,
    min_language_consistency=0.9,
    allow_code_blocks=False,
    max_repetition=0.3,
    ngram_overlap=5,
    per_prompt=2,
)
QUESTION = "Tom has 3 apples and buys 4 more. How many?"
GOOD = "First we add the apples: 3+4=7."


def row(reasoning=GOOD, summary="The answer is 7.", question=QUESTION, correct=1.0, **more):
    text = more.get("text", f"<think>\n{reasoning}\n</think>\n\n{summary}")
    prompt = Prompt(question, "word", more.get("language", "en"), question, "7")
    score = Score(correct, more.get("status", Status.SCORED))
    return Sampled(prompt, Completion([1], [0.0], more.get("reason", "stop"), text), {"accuracy": score})


def dropped_by(rows, config=CONFIG, eval_questions=()):
    kept, funnel = apply_filters(rows, config, eval_questions)
    assert len(rows) - sum(step["dropped"] for step in funnel) == len(kept) == funnel[-1]["kept"]
    return [step["name"] for step in funnel for _ in range(step["dropped"])]


BAD = {
    "correct": [row(correct=0.0), row(correct=1.0, status=Status.VERIFIER_FAILED)],
    "well formed": [
        row(text=f"{GOOD} The answer is 7."),
        row(reason="length"),
        dataclasses.replace(row(), scores={"accuracy": Score(1.0), "format": Score(0.0)}),
    ],
    "one language": [
        row(reasoning="First we add 然后三个加四个得到七个"),
        row(summary="答案是7。"),
        row(language="zh"),
    ],
    "paragraph length": [row(reasoning=" ".join(f"{GOOD[:-1]} {i}" for i in range(5)))],
    "code blocks": [row(reasoning=f"{GOOD}\n```python\nprint(7)\n```")],
    "repetition": [row(reasoning="we add the apples and " * 4)],
    "duplicates": [],
    "overlap with evaluation": [row(question="What is 2+2?"), row(question="So 1 2 3 4 5 it is")],
    "cap per prompt": [],
}
EVAL_QUESTIONS = ["what is 2 + 2 ?", "Count 1 2 3 4 5 6 slowly"]


def test_each_filter_has_a_case_here():
    assert list(BAD) == list(FILTERS)


@pytest.mark.parametrize(("name", "bad"), [(name, bad) for name, rows in BAD.items() for bad in rows])
def test_a_bad_row_is_dropped_by_its_own_filter_and_a_good_one_passes(name, bad):
    assert dropped_by([bad, row()], eval_questions=EVAL_QUESTIONS) == [name]


def test_equal_reasoning_for_one_prompt_is_kept_once_and_the_rest_is_capped():
    rows = [row(f"Way {i}: we add them.") for i in (1, 1, 2, 3)] + [
        row("Way 1:  we add them.", question="Another?")
    ]
    kept, funnel = apply_filters(rows, CONFIG, [])
    assert [r.completion.text.split(":")[0][-1] for r in kept] == [
        "1",
        "2",
        "1",
    ]  # in order; the other prompt too
    steps = {step["name"]: step for step in funnel}
    assert steps["duplicates"]["dropped"] == 1 and steps["cap per prompt"]["dropped"] == 1


def test_the_funnel_counts_in_order_and_shows_three_examples():
    rows = [row(f"{i} is wrong", correct=0.0) for i in range(5)] + [row(summary="答案是7。"), row()]
    kept, funnel = apply_filters(rows, CONFIG, [])
    assert len(kept) == 1 and [step["name"] for step in funnel] == list(FILTERS)
    assert funnel[0] == {
        "name": "correct",
        "kept": 2,
        "dropped": 5,
        "examples": [r.completion.text for r in rows[:3]],
    }
    assert apply_filters([], CONFIG, [])[1][0] == {"name": "correct", "kept": 0, "dropped": 0, "examples": []}


def test_filters_can_be_set_wide():
    wide = FilterConfig(10**6, 0.0, True, 1.0, 0, 10**6)
    rows = [
        *BAD["one language"][:2],
        *BAD["paragraph length"],
        *BAD["code blocks"],
        *BAD["repetition"],
        BAD["overlap with evaluation"][0],
    ]
    assert dropped_by(rows, wide, EVAL_QUESTIONS) == []


def test_phrasing_that_evaluation_questions_share_is_no_overlap():
    shared = [
        "Tom has 3 pens. How many pens does he have left?",
        "Amy has 9 pens. How many pens does he have left?",
    ]
    assert (
        dropped_by([row(question="Bob has 5 cups. How many pens does he have left?")], CONFIG, shared) == []
    )
    assert ("tom", "has", "3", "pens", ".") in distinctive_grams(shared, 5)
    assert ("how", "many", "pens", "does", "he") not in distinctive_grams(shared, 5)
    assert distinctive_grams(shared[:1] * 2, 5)  # the same question twice is one question


def test_repetition_is_the_share_of_repeated_4_grams():
    assert repetition("a b c d") == 0 and repetition("") == 0 and repetition("a b") == 0
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)  # abcd bcda cdab dabc abcd
    assert repetition("加" * 7) == pytest.approx(3 / 4)


def test_words_of_both_languages():
    assert words("先算 3+14=17, then Stop") == ["先", "算", "3", "+", "14", "=", "17", ",", "then", "stop"]
