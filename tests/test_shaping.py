"""The optional rewards of length and repetition, against the formulas they are named after."""

import math
import re

import pytest
from rl_runs import scored_groups

from r1pipe.config.compose import compose
from r1pipe.config.rl import RULE_REWARDS, WEIGHED_ELSEWHERE
from r1pipe.core.types import Completion, Group, Prompt, Score, Status
from r1pipe.rewards import BASE_REWARDS, SHAPING_REWARDS, add_shaping_rewards
from r1pipe.rewards.repetition import repeated
from r1pipe.runs.reward_model_quality import KINDS
from r1pipe.train.rl import scoring
from r1pipe.train.rl.rows import rows_of, summarise, too_many_failures

REWARDS = compose(["stage=grpo"]).config.stage.rewards
PROMPT = Prompt("word-1", "word", "en", "?", "42")


RIGHT = Score(1.0)


def shaped(name, tokens, reason="stop", verdict=RIGHT, **values):
    config = REWARDS.__class__(**{**vars(REWARDS), **values})
    tokens = list(range(tokens)) if isinstance(tokens, int) else tokens
    row = {"accuracy": verdict} if verdict else {}
    completion = Completion(tokens, [0.0] * len(tokens), reason, "")
    add_shaping_rewards([row], [completion], [name], config, 100)
    return row.get(name)


@pytest.mark.parametrize(
    ("right", "tokens", "value"),
    [(1, 0, 2), (1, 50, 1.5), (1, 99, 1.0002), (0, 0, -10), (0, 50, -5), (0, 99, -0.0025), (1, 100, -10)],
)
def test_cosine_pays_short_right_and_long_wrong_answers(right, tokens, value):
    assert shaped("cosine", tokens, verdict=Score(float(right))).value == pytest.approx(value, abs=1e-3)


def test_cosine_falls_all_the_way_and_fails_where_accuracy_fails():
    values = [shaped("cosine", n).value for n in range(100)]
    assert values == sorted(values, reverse=True)
    assert values[30] == pytest.approx(1 + 0.5 * (2 - 1) * (1 + math.cos(0.3 * math.pi)))
    failed = Score(0.0, Status.VERIFIER_FAILED, "too slow")
    assert shaped("cosine", 10, verdict=failed) == failed
    assert shaped("cosine", 10, verdict=None) is None  # no rule applies


@pytest.mark.parametrize(
    ("tokens", "value"), [(0, 0), (80, 0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1)]
)
def test_overlong_is_dapo_s_equation_13(tokens, value):
    assert shaped("overlong", tokens, overlong_cache=0.2).value == pytest.approx(value)


def test_overlong_punishes_what_was_cut_off_in_full_even_without_a_cache():
    assert shaped("overlong", 50, "length").value == -1
    assert shaped("overlong", 99, overlong_cache=0.0).value == 0
    assert shaped("overlong", 100, overlong_cache=0.0).value == -1


@pytest.mark.parametrize(
    ("tokens", "n", "count"),
    [
        ([1, 2, 1, 2], 2, 2),
        ([1, 2, 3, 4], 2, 0),
        ([7] * 10, 3, 9),
        ([1, 2, 3, 1, 2, 3, 9], 3, 3),
        ([1], 2, 0),
    ],
)
def test_repeated_tokens_are_counted_once(tokens, n, count):
    assert repeated(tokens, n) == count
    assert shaped("repetition", tokens, repetition_ngram=n).value == pytest.approx(-count / len(tokens))


def test_they_are_optional_and_weighed_by_name():
    assert not set(BASE_REWARDS) & set(SHAPING_REWARDS)
    assert not [name for name in SHAPING_REWARDS if REWARDS.weights.get(name)], (
        "off unless they are asked for"
    )
    text = "<think>\nx\n</think>\n\nThe answer is 42."
    completions = [Completion([1] * n, [0.0] * n, "stop", text) for n in (10, 90)]
    weights = {"accuracy": 1.0, "overlong": 2.0}
    [group] = scored_groups([PROMPT], completions, weights)
    assert group.rewards == pytest.approx([1.0, 0.0])
    rows = rows_of([group], None)
    assert summarise(rows)["rewards/overlong/mean"] == pytest.approx(-0.25)


def test_the_config_knows_every_reward_by_name():
    assert {*RULE_REWARDS} == {*BASE_REWARDS, *SHAPING_REWARDS}
    assert {*WEIGHED_ELSEWHERE} == {*KINDS, scoring.KL}


def test_more_failures_than_allowed_are_told_in_one_line():
    verdicts = [Score(1.0), Score(0.0), Score(0.0, Status.INFRASTRUCTURE_FAILED, "no sandbox"), Score(1.0)]
    completions = [Completion([1], [0.0], "stop", "x")] * 4
    scores = [{"accuracy": verdict, "format": Score(1.0)} for verdict in verdicts]
    rows = rows_of([Group(PROMPT, completions, scores, [1.0, 0.0, math.nan, 1.0], [0.0] * 4)], None)
    metrics = summarise(rows)
    assert metrics["rewards/accuracy/failed"] == 0.25 and metrics["rewards/format/failed"] == 0
    assert too_many_failures(metrics, 0.25, rows) == ""
    assert re.search(
        r"^25% of the accuracy .*no sandbox.*max_failed=0\.1", too_many_failures(metrics, 0.1, rows)
    )
