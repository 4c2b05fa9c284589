"""Rule rewards: what earns 1, what earns 0, and what must not be scored at all."""

import subprocess
import sys
import time

import pytest

from r1pipe.core.errors import ConfigError, DataError
from r1pipe.core.types import Completion, Prompt, Score, Status
from r1pipe.rewards import (
    BASE_REWARDS,
    check_gold,
    language_share,
    score_all,
    symbolic,
    votes,
)
from r1pipe.rewards.accuracy import accuracy, check_answer, check_countdown, is_correct
from r1pipe.rewards.answers.reading import last_stated
from r1pipe.rewards.equation import calculation, equation
from r1pipe.rewards.programs import sandbox
from r1pipe.rewards.programs.check import check_program
from r1pipe.rewards.programs.comparison import same_value
from r1pipe.rewards.programs.extraction import find_function


def prompt(answer="42", task="word", language="en", **checker):
    return Prompt(f"{task}-1", task, language, "How many?", answer, checker)


def respond(summary, reasoning="First we add 3+4.", reason="stop"):
    return Completion([1], [0.0], reason, f"<think>\n{reasoning}\n</think>\n\n{summary}")


DOUBLE = prompt("", "program", entry_point="f", tests=[[[2], 4], [[-1], -2], [[[1]], [1, 1]]])


@pytest.mark.parametrize(
    ("gold", "summary", "value"),
    [
        ("42", "The answer is 42.", 1),
        ("42", "答案是42。", 1),
        ("42", "答案：４２", 1),
        ("42", "So the answer is **42**.", 1),
        ("42", "The answer is 41. No: the answer is 42.", 1),
        ("42", "The answer is 42. No: the answer is 41.", 0),
        ("42", r"The answer is 41, that is \boxed{42}.", 1),
        ("42", "42", 0),  # states no final answer
        ("42", "The answer is forty-two.", 1),
        ("1234567", "The answer is 1,234,567 apples.", 1),
        ("145.0", "The answer is 145", 1),
        ("0.75", r"\boxed{\frac{3}{4}}", 1),
        ("3/4", "The answer is 0.75.", 1),
        ("1/3", "The answer is 0.33.", 0),
        ("50%", "The answer is 0.5.", 1),
        ("50", "The answer is 50%.", 1),
        ("50%", "The answer is 0.5%.", 0),
        ("18", "#### $18", 1),
        ("-7", "The answer is −7.", 1),
        ("5", "The answer is 5 million.", 0),
        ("30000", "答案是3万元。", 1),
        ("3", "The answer is 3 and a half.", 0),
        ("3", "The answer is 3 or 4.", 0),
        ("5 km", "The answer is 5 m.", 0),
        ("5 km", "The answer is 5.", 1),
        ("2", "The answer is 2ab.", 0),
        ("B", "The answer is (B).", 1),
        ("B", "The answer is C.", 0),
        ("B", "The answer is B. Paris", 1),
        ("B", r"\boxed{B. Paris}", 1),
        ("B", r"\boxed{(B) Paris and Rome}", 1),
        ("B", r"\boxed{B: vitamin C}", 1),
        ("B", r"\boxed{\text{B. A dog}}", 1),
        ("B. Paris", r"\boxed{B}", 1),
        ("B", "答案是B、巴黎。", 1),
        ("A", "The answer is A or B or C or D.", 0),
        ("A", r"\boxed{A, B, C, D}", 0),
        ("A", r"\boxed{ABCD}", 0),
        ("A", r"\boxed{A B}", 0),
        ("A", r"\boxed{(A)(B)}", 0),
        ("A", r"\boxed{A. Paris, B. Rome}", 0),
        ("A", r"\boxed{A. Paris B. Rome}", 0),
        ("A", r"\boxed{A. or another}", 0),
        ("A", "答案是A或B。", 0),
        ("A", r"\boxed{A dog}", 0),
        ("C", "The answer is C or D.", 0),
        ("I", "The answer is I do not know.", 0),
        ("I", r"\boxed{I}", 1),
        ("A, C", r"\boxed{A}", 0),
        ("A, C", r"\boxed{A, D}", 0),
        ("A, C", r"\boxed{A, C, D}", 0),
        ("A, C", r"\boxed{C, A}", 1),
        ("A, C", "The answer is (A) and (C).", 1),
        ("A, C", "答案是A、C。", 1),
        ("A, C", "The answer is A or C.", 0),
        ("0.0000005", r"\boxed{0}", 0),
        ("0.0000005", r"\boxed{0.0000006}", 0),
        ("0.0000005", r"\boxed{0.00000050000001}", 1),
        ("0", r"\boxed{0.0000005}", 0),
        ("0", r"\boxed{0.0}", 1),
        ("1/3", r"\boxed{0.33333}", 0),
        ("1/3", r"\boxed{0.333333}", 1),
        ("2000000.5", r"\boxed{2000001}", 0),  # no looser above 1
        (r"\text{Evelyn}", r"\boxed{Evelyn}", 1),
        (r"\frac{\sqrt{3}}{2}", r"The answer is $\sqrt{3}/2$.", 1),
        (r"(3,\frac{\pi}{2})", r"\boxed{\left(3, \pi/2\right)}", 1),
        (r"(3,\frac{\pi}{2})", r"\boxed{(3, \pi)}", 0),
        (r"x^2+2x+1", r"\boxed{(x+1)^2}", 1),
    ],
)
def test_final_answers(gold, summary, value):
    assert check_answer(prompt(gold), summary) == Score(
        value, detail=check_answer(prompt(gold), summary).detail
    )


@pytest.mark.parametrize(
    "text",
    [
        "<think>\nThe answer is 42.\n</think>\n\nThe answer is 41.",
        "<think>\nThe answer is 42.\n</think>\n\n",
        "<think>\nThe answer is 42.",  # cut off while thinking
        "Well. <think> The answer is 42.",
    ],
)
def test_a_right_number_inside_the_reasoning_earns_nothing(text):
    assert accuracy(prompt(), Completion([1], [0.0], "stop", text)).value == 0
    assert not is_correct(prompt(), text)


def test_an_answer_without_think_tags_is_still_right():
    assert is_correct(prompt(), "6*7. The answer is 42.")


@pytest.mark.parametrize("gold", ["", "  ", "n/a ???", "见解析", r"m^2n\cdot m=m^3\cdot"])
def test_a_gold_answer_that_does_not_parse_is_refused(gold):
    with pytest.raises(DataError, match="word-1"):
        check_gold(prompt(gold))


def test_gold_that_can_be_matched_is_accepted():
    for gold in ("42", "1,000", "$18", "3/4", "C", r"\frac{\sqrt{3}}{2}", r"(-\infty, 3]"):
        check_gold(prompt(gold))
    check_gold(DOUBLE)
    check_gold(prompt("", "countdown", numbers=[1, 2], target=3))
    check_gold(prompt("", "writing"))  # the hidden truth judges it


@pytest.mark.parametrize(
    "broken",
    [
        prompt("", "countdown", numbers=[], target=3),
        prompt("", "countdown", numbers=[1, 2]),
        prompt("", "program", entry_point="f", tests=[]),
        prompt("", "program", entry_point="f", tests=[[2, 4]]),
        prompt("", "program", entry_point="f()", tests=[[[2], 4]]),
    ],
)
def test_a_checker_that_lacks_something_is_refused(broken):
    with pytest.raises(DataError):
        check_gold(broken)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("12+7-5+3", 1),
        ("(12 + 7) - (5 - 3)", 1),
        ("12+7-5+3=17", 1),
        ("12+5", 0),  # right value, numbers missing
        ("12+7-5+3+3-3", 0),  # a number used too often
        ("12+7+5-3", 0),  # 21
        ("17", 0),
        ("12+7-5+3+0", 0),
        ("12//1+7-5+3", 0),
        ("12**7-5+3", 0),
        ("-5+12+7+3", 0),  # no sign in front of a number
        ("__import__('os').getcwd()", 0),
        ("(" * 150 + "12" + ")" * 150, 0),
        ("12+7-5", 0),
    ],
)
def test_countdown(expression, value):
    task = prompt("", "countdown", numbers=[5, 12, 7, 3], target=17)
    assert check_countdown(task, f"The answer is {expression}.").value == value
    assert check_countdown(task, f"答案是{expression}。").value == value


def test_programs_are_found_in_fences_and_plain():
    assert (
        find_function("Here:\n```python\ndef f(x):\n    return 2*x\n```\nDone.", "f")
        == "def f(x):\n    return 2*x"
    )
    assert find_function("答案是def f(x): return 2*x。", "f") == "def f(x): return 2*x"
    assert find_function("The program is def f(x): return 2*x", "f") == "def f(x): return 2*x"
    assert (
        find_function("import is hard.\ndef f(x):\n    return 2*x\nIt doubles x.", "f")
        == "def f(x):\n    return 2*x"
    )
    assert find_function("There is none.", "f") is None


@pytest.mark.parametrize(
    ("summary", "value"),
    [
        ("```python\ndef f(x):\n    return x + x\n```", 1),
        ("def f(x): return 2*x", 1),
        ("def f(x): return x", 0),
        ("def g(x): return x + x", 0),
        ("def f(x): return x + x + oops", 0),
        ("def f(x) return x + x", 0),
        ("no program", 0),
    ],
)
def test_programs_are_right_when_all_tests_pass(summary, value):
    assert check_program(DOUBLE, summary).value == value


def test_results_are_compared_as_plain_values():
    assert same_value((1, 2.0), [1, 2]) and same_value(0.1 + 0.2, 0.3) and same_value({"a": [1]}, {"a": (1,)})
    assert not same_value([1], [1, 2]) and not same_value(10**400, 1.0) and not same_value(object(), None)
    assert not same_value("[1]", [1]) and not same_value({"a": 1}, {"b": 1})


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>\n6*7\n</think>\n\nThe answer is 42.", 1),
        ("Sure! <think>\n6*7\n</think>\n\nThe answer is 42.", 0),
        ("6*7</think>\n\nThe answer is 42.", 0),  # as if the template had opened it
        ("<think>\n6*7\nThe answer is 42.", 0),
        ("<think>\n\n</think>\n\nThe answer is 42.", 0),
        ("<think>\n6*7\n</think>\n\n", 0),
        ("<think>\n6*7\n</think>\n\nIt is done.", 0),  # no final answer
        ("<think>\n6*7\n</think>\n\n<think>\nThe answer is 42.\n</think>", 0),
        ("<think>\n6*7\n</think>\n\nThe answer is 42.<｜User｜>", 0),
        ("The answer is 42.", 0),
        ("", 0),
    ],
)
def test_format(text, value):
    assert BASE_REWARDS["format"](prompt(), Completion([1], [0.0], "stop", text)).value == value


def test_format_of_a_general_prompt_needs_no_final_answer_and_a_cut_one_has_none():
    assert BASE_REWARDS["format"](prompt("", "writing"), respond("A poem.")).value == 1
    assert BASE_REWARDS["format"](prompt(), respond("The answer is 42.", reason="length")).value == 0
    assert BASE_REWARDS["format"](DOUBLE, respond("def f(x): return x + x")).value == 1
    assert BASE_REWARDS["format"](DOUBLE, respond("The answer is 4.")).value == 0


ENGLISH = "First we add three and four and then multiply it by six."  # 12 words
LONG = " ".join(4 * [ENGLISH])  # more than may hide anywhere


@pytest.mark.parametrize(
    ("text", "language", "share"),
    [
        ("First we add 3+4=7.", "en", 1.0),
        ("先算 3+4=7，then multiply", "zh", 0.5),  # 先, 算 / then, multiply
        ("先算 3+4=7，then multiply", "en", 0.5),
        ("三个 apples", "zh", 2 / 3),
        ("3+4=7, 7*x=14, km", "zh", 1.0),  # a unit
        ("3+4=7, x=2", "zh", 1.0),  # nothing to count
        (
            "先算 `for item in items` 和 $total = a + \\frac{b}{c}$，```python\nprint(total)\n```得到",
            "zh",
            1.0,
        ),
        ("我们 don't know", "zh", 0.5),  # 我, 们 / don't, know
        (f"`{LONG}`", "zh", 0.0),
        (f"`{LONG}`", "en", 1.0),
        (f"${LONG}$", "zh", 0.0),
        (rf"\(\text{{{LONG}}}\)", "zh", 0.0),
        (f"```\n{LONG}", "zh", 0.0),
        (f"`{LONG}", "zh", 0.0),
        (rf"\({LONG}", "zh", 0.0),
        (f"<|{LONG}|>", "zh", 0.0),
        (LONG.replace(" ", " \\"), "zh", 0.0),
        (" ".join(f"<{word}>" for word in LONG.split()), "zh", 0.0),
        (f"先算 ```\n{LONG}\n```", "zh", 2 / 18),  # 48 words of code, of which 32 are free
        (f"先把这些数都加起来再乘以七 `{ENGLISH}`", "zh", 1.0),
        (f"```\n{4 * '先算三加四再乘以六得到四十二'}\n```", "en", 0.0),
        ("直接写`sum([x for x in xs if x>6])`", "zh", 1.0),  # a line of code, as programs' thoughts have it
        (r"先算 $\frac{\sqrt{a}}{\cos\alpha}\cdot\sin\beta\times\tan\gamma\leq\left(\pi\right)$", "zh", 1.0),
    ],
)
def test_language_share(text, language, share):
    assert language_share(text, language) == pytest.approx(share)


@pytest.mark.parametrize("mark", ["<|", "<｜", r"\(", r"\[", "$$ x", "```a", "`\n", "$\n", "<a", "\\a", "</"])
def test_language_takes_time_linear_in_the_text(mark):
    began = time.process_time()
    language_share(mark * 100_000, "en")
    assert time.process_time() - began < 60  # of a fifth of a second; were it quadratic, it would be minutes


def test_a_hostile_choice_takes_no_time():
    began = time.process_time()
    for text in ("A" + " " * 200_000 + "x", "A." + "\n" * 200_000 + "x", "A," * 200_000 + "x"):
        assert check_answer(prompt("A"), rf"\boxed{{{text}}}").value == 0
    assert time.process_time() - began < 60  # as above


def test_language_looks_at_the_reasoning_alone():
    zh = prompt(language="zh")
    assert BASE_REWARDS["language"](zh, respond("The answer is 42.", reasoning="先算六乘七")).value == 1
    assert BASE_REWARDS["language"](zh, respond("答案是42。", reasoning="multiply")).value == 0
    # what is not well formed is all reasoning
    assert BASE_REWARDS["language"](zh, Completion([1], [0.0], "stop", "<think>先算 six 六")).value == 0.75
    assert BASE_REWARDS["language"](zh, Completion([1], [0.0], "stop", "")).value == 0


@pytest.mark.parametrize(
    ("gold", "reasoning", "value"),
    [
        ("12", "15 - 3 = 13", 1.0),
        ("12", "15 + 3 = 12", 0.0),
        ("12", "First 2 + 2 = 4. Then 4 × 3 = 11", 1.0),
        ("12", "4 × 3 = 12. Then 12 + 1 = 13", 0.0),
        ("1,200", "( 1,000 + 1,400 ) / 2 = 1200", 1.0),
        ("125", "58 + 67 = 118 + 7 = 124", 1.0),
        ("125", "58 + 68 = 118 + 7 = 125", 0.0),
        ("12", "There are 9, 2 + 3 = 5.\n4 × 3 = 11", 1.0),
        ("12", "5 + 4 = 9\n4 × 3 = 11", 1.0),
        ("0.3333", "$1 ÷ 3 = 0.3", 1.0),
        ("-2", "-5 + 3 = 8", 1.0),
        ("12", "12 = 12", 0.0),
        ("512", "2**9 = 512", 0.0),
        ("12", "36 / 0 = 12", 0.0),
        ("12", "twelve", 0.0),
        ("12", "(" * 90 + "15 - 3" + ")" * 90 + " = 13", 1.0),
        ("north", "15 - 3 = 13", None),
        ("", "15 - 3 = 13", None),
    ],
)
def test_an_equation_earns_by_what_it_should_give(gold, reasoning, value):
    score = equation(prompt(gold), respond("The answer is 13.", reasoning))
    assert (score and score.value) == value


@pytest.mark.parametrize(
    ("gold", "reasoning", "value"),
    [
        ("12", "15 - 3 = 12", 1.0),
        ("12", "15 + 3 = 18", 1.0),  # whether it is the right one, `equation` says
        ("12", "15 - 3 = 13", 0.0),
        ("125", "58 + 67 = 118 + 7 = 125", 1.0),
        ("125", "58 + 67 = 118 + 8 = 125", 0.0),
        ("125", "58 + 67 = 118 + 7", 1.0),
        ("0", "4 - 4 = 0", 1.0),
        ("12", "2 + 2 = 5. Then 4 × 3 = 12", 1.0),
        ("0.33", "1 / 3 = 0.3333", 1.0),
        ("12", "12 = 12", 0.0),
        ("12", "15 - 3 =", 0.0),
        ("12", "36 / 0 = 12", 0.0),
        ("12", "15 - 3", 0.0),
        ("north", "15 - 3 = 12", None),
    ],
)
def test_a_calculation_earns_by_whether_it_is_true(gold, reasoning, value):
    score = calculation(prompt(gold), respond("The answer is 13.", reasoning))
    assert (score and score.value) == value


def test_an_endless_expression_takes_no_time():
    began = time.process_time()
    assert equation(prompt("12"), respond("", "1+" * 200_000)).value == 0.0
    assert time.process_time() - began < 5


def test_score_all_keeps_order_and_skips_accuracy_where_no_rule_applies():
    prompts = [prompt("1"), prompt("", "writing"), prompt("3")]
    completions = [respond("The answer is 1."), respond("A poem."), respond("The answer is 4.")]
    scores = score_all(prompts, completions, ["accuracy", "format", "language"])
    everything = ["accuracy", "format", "language"]
    assert [sorted(row) for row in scores] == [everything, ["format", "language"], everything]
    # prompts 0 and 2 share an id here; their summaries differ, so each has its own verdict
    assert [row.get("accuracy", Score(9)).value for row in scores] == [1, 9, 0]
    assert scores == score_all(prompts, completions, ["accuracy", "format", "language"])
    assert score_all([], [], ["accuracy"]) == []


def test_equal_summaries_of_one_prompt_are_checked_once(monkeypatch):
    seen = []
    monkeypatch.setattr(sandbox, "run_calls", lambda *job: seen.append(job) or Score(1.0))
    completions = [respond("def f(x): return x + x", reasoning=f"try {i}") for i in range(5)]
    scores = score_all([DOUBLE] * 5, completions, ["accuracy"])
    assert [row["accuracy"].value for row in scores] == [1] * 5 and len(seen) == 1


def test_an_unknown_reward_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean accuracy"):
        score_all([], [], ["acuracy"])


def test_votes_join_equal_answers_only():
    numbers = [
        respond(f"The answer is {text}.").text for text in ("1,000", "1000.0", "1000 apples", "2000/2", "100")
    ]
    *equal, other = votes(prompt(), numbers)
    assert len({*equal}) == 1 and other == "100"
    countdown = prompt("", "countdown", numbers=[1, 2], target=3)
    expressions = ["The answer is (1 + 2).", "The answer is 1+2.", "The answer is 2+1."]
    assert votes(countdown, expressions) == ["1 + 2", "1 + 2", "2 + 1"]
    one, same = votes(
        DOUBLE, ["def f(x): return  2*x  # twice", "```python\ndef f(x):\n    return 2 * x\n```"]
    )
    assert one == same
    assert votes(prompt(), ["I give up."]) == [""]


@pytest.mark.parametrize("body", ["1" + " + 1" * 330, "-" * 900 + "x", "not " * 900 + "x", "f" + "()" * 330])
def test_a_program_nested_too_deeply_to_be_written_out_votes_by_its_text(body):
    text = f"def f(x):\n    return {body}"
    response = respond(f"```python\n{text}\n```")
    assert BASE_REWARDS["format"](DOUBLE, response).status is Status.SCORED
    assert votes(DOUBLE, [response.text])[0] in (text, "")  # "" where it is too deep to be parsed


@pytest.mark.parametrize(
    "body", ["(" * 5000, "[" * 5000 + "]" * 5000, "1" + "+1" * 30_000, "x\0", "9" * 5000]
)
def test_a_text_that_python_cannot_parse_is_no_program(body):
    response = respond(f"```python\ndef f(x):\n    return {body}\n```")
    assert votes(DOUBLE, [response.text]) == [""] and BASE_REWARDS["format"](DOUBLE, response).value == 0


def test_reasoning_gym_scores_with_its_own_checker():
    reasoning_gym = pytest.importorskip("reasoning_gym")
    entry = reasoning_gym.create_dataset("chain_sum", size=1, seed=0)[0]
    task = prompt(entry["answer"], "chain_sum", reasoning_gym="chain_sum", entry=entry)
    assert is_correct(task, f"The answer is {entry['answer']}.") and not is_correct(
        task, "The answer is none."
    )


def test_plain_answers_need_no_worker(monkeypatch):
    monkeypatch.setattr(symbolic, "_ask", None)
    prompts = [Prompt(f"word-{i}", "word", "en", "?", str(i)) for i in range(1000)]
    completions = [respond(f"The answer is {i + i % 2}.") for i in range(1000)]
    scores = score_all(prompts, completions, ["accuracy"])
    assert [row["accuracy"].value for row in scores] == [1, 0] * 500


def test_scoring_imports_no_torch():
    command = "import sys, r1pipe.rewards; sys.exit('torch' in sys.modules or 'sympy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0


def test_full_width_and_dressing_are_taken_off():
    assert last_stated("The answer is **＄４２．５**。") == "$42.5"
    assert last_stated(r"so \boxed{\frac{1}{\sqrt{2}}} it is") == r"\frac{1}{\sqrt{2}}"
    assert last_stated(r"so \boxed{1") is None
