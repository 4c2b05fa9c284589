"""`r1pipe score`: a verdict a row."""

import json
import subprocess
import sys

import pytest

from r1pipe.config import script_options
from r1pipe.config.script_options import ScoreOptions
from r1pipe.core.paths import stages_dir
from r1pipe.rewards.programs import jail

JAIL = jail.is_available()
SCRIPT = str(stages_dir() / "score.py")
ADD = {
    "prompt": 'def add(a, b):\n    """The sum."""\n',
    "entry_point": "add",
    "tests": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}


def scored(folder, rows, reward, language="en", strict=False, **limits):
    """Exit code, the verdicts, and standard error; a row that is text is written as it is."""
    file = folder / "rows.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    options = folder / "options.json"
    script_options.write(ScoreOptions(file, reward, language, strict, **limits), options)
    done = subprocess.run(
        [sys.executable, SCRIPT, str(options)], capture_output=True, encoding="utf-8", check=False
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


def values(rows):
    return [row["value"] for row in rows]


def test_accuracy_judges_each_row_by_its_own_answer(tmp_path):
    rows = [
        {"question": "?", "answer": "42", "completion": "<think>\n6*7\n</think>\n\nThe answer is 42."},
        {"question": "?", "answer": "41", "completion": "<think>\n6*7\n</think>\n\nThe answer is 42."},
        "",
        {"question": "?", "answer": 0.5, "completion": r"\boxed{\frac{1}{2}}"},
        {"question": "?", "answer": r"(-\infty, 2]", "completion": r"\boxed{(-\infty,2]}"},
        {"question": "?", "answer": "B", "completion": "The answer is (C)."},
        {"question": "?", "answer": "3", "completion": "I cannot tell."},
    ]
    code, out, err = scored(tmp_path, rows, "accuracy")
    assert (code, err) == (0, "") and values(out) == [1, 0, 1, 1, 0, 0]
    assert all(set(row) == {"status", "value", "detail"} and row["status"] == "scored" for row in out)


def test_rows_as_other_tools_write_them(tmp_path):
    message = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "The answer is 5."}]
    rows = [
        "\ufeff" + json.dumps({"question": "?", "answer": "5", "completion": "The answer is 5.0"}) + "\r",
        {"question": "?", "answer": ["five", "5"], "completion": "The answer is 5."},
        {"question": "?", "answer": "5", "completion": message},
        {"question": "?", "answer": 1e-7, "completion": r"\boxed{10^{-7}}"},
    ]
    code, out, err = scored(tmp_path, rows, "accuracy")
    assert (code, err) == (0, "") and values(out) == [1, 1, 1, 1]


def test_strict_ends_at_the_first_refused_row(tmp_path):
    rows = [GOOD, {**GOOD, "answer": "see solution"}, GOOD]
    code, out, err = scored(tmp_path, rows, "accuracy", strict=True)
    assert code == 2 and out == [] and "rows.jsonl:2: the gold answer 'see solution' is no answer" in err


def test_any_language_is_told_or_refused(tmp_path):
    question = "¿Cuántas manzanas tiene Ana en la cesta?"
    spanish = {"question": question, "completion": "Primero sumamos tres y cuatro."}
    assert values(scored(tmp_path, [spanish], "language", "es")[1]) == [1]
    assert values(scored(tmp_path, [spanish], "language", "auto")[1]) == [1]
    assert values(scored(tmp_path, [spanish], "language", "en")[1]) == [0]
    code, out, err = scored(tmp_path, [spanish], "language", "english")
    assert (code, out) == (2, []) and "language english is unknown" in err


def test_code_rows_may_be_those_of_public_data_sets(tmp_path):
    double, slow = "```python\nprint(2 * int(input()))\n```", "```python\nwhile True: pass\n```"
    apps = {"input_output": json.dumps({"inputs": ["3\n", "5\n"], "outputs": ["6\n", "10\n"]})}
    half = "```python\nn = int(input())\nprint(6)\n```"
    rows = [{**apps, "completion": text} for text in (double, slow, half)]
    asserts = {"text": "?", "test_list": ["assert f(2) == 4"]}
    rows.append({**asserts, "completion": "def f(x): return 2 * x"})
    code, out, err = scored(tmp_path, rows, "code", cpu_seconds=0.5, memory_mb=64, partial_credit=True)
    assert (code, err) == (0, "") and values(out) == ([1, 0, 0.5, 1] if JAIL else [None, None, None, 1])


def test_code_runs_what_a_completion_holds(tmp_path):
    asserts = {**ADD, "tests": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]}
    rows = [
        {**ADD, "completion": "    return a + b\n"},
        {**ADD, "completion": "return a + b"},
        {**ADD, "completion": "<think>\nsum\n</think>\n\n```python\ndef add(a, b):\n    return a + b\n```"},
        {**ADD, "completion": "```python\n    c = a + b\n    return c\n```\nDone."},
        {**asserts, "completion": "def add(a, b): return a + b"},
        {**ADD, "completion": "    return a - b\n"},
        {**ADD, "completion": "<think>\n```python\ndef add(a, b): return a + b\n```\n</think>\n\nNo."},
        {**ADD, "completion": "import sys\nsys.exit(0)"},
        {**ADD, "completion": "I cannot."},
    ]
    code, out, err = scored(tmp_path, rows, "code")
    assert (code, err) == (0, "") and values(out) == [1, 1, 1, 1, 1, 0, 0, 0, 0]
    assert all(row["status"] == "scored" for row in out)


def test_what_has_no_verdict_has_no_value(tmp_path):
    beyond = {**ADD, "tests": "import nowhere_at_all, socket\n" + ADD["tests"], "completion": "return a + b"}
    hard = {"question": "?", "answer": r"\sqrt{2}", "completion": r"\boxed{\prod_{k=1}^{10^{6}} k}"}
    code, [verdict], _ = scored(tmp_path, [hard], "accuracy")
    assert code == 0 and verdict["status"] == "verifier_failed" and verdict["value"] is None
    code, [verdict], _ = scored(tmp_path, [beyond], "code")
    assert code == 0 and verdict["status"] == "verifier_failed" and verdict["value"] is None


def test_format_and_language(tmp_path):
    rows = [
        {"question": "?", "answer": "1", "completion": "<think>\n先算 add\n</think>\n\nThe answer is 1."},
        {"question": "?", "answer": "1", "completion": "The answer is 1."},
    ]
    assert values(scored(tmp_path, rows, "format")[1]) == [1, 0]
    assert values(scored(tmp_path, rows, "language", "zh")[1])[0] == pytest.approx(2 / 3)
    assert values(scored(tmp_path, rows, "language")[1])[0] == pytest.approx(1 / 3)


GOOD = {"question": "?", "answer": "1", "completion": "x"}


@pytest.mark.parametrize(
    ("rows", "reward", "told"),
    [
        ([GOOD, "{"], "accuracy", "rows.jsonl:2: not JSON"),
        ([GOOD, "", "[1]"], "accuracy", "rows.jsonl:3: no JSON object"),
        (["\udcff"], "accuracy", "rows.jsonl:1: not JSON"),
        (["[" * 100000], "accuracy", "rows.jsonl:1: nested too deeply"),
        ([{"question": "?", "answer": "1"}], "accuracy", "rows.jsonl:1: completion is missing"),
        ([{**GOOD, "answer": None}], "accuracy", "rows.jsonl:1: answer is missing"),
        ([{**GOOD, "completion": 3}], "accuracy", "rows.jsonl:1: completion must be a string"),
        ([{**GOOD, "answer": [{}]}], "accuracy", "rows.jsonl:1: answer must be a string"),
        (
            [GOOD, {**GOOD, "answer": "n/a ???"}],
            "accuracy",
            "rows.jsonl:2: the gold answer 'n/a ???' does not parse",
        ),
        ([{**GOOD, "answer": " "}], "accuracy", "rows.jsonl:1: the gold answer is empty"),
        ([GOOD], "code", "rows.jsonl:1: it has no tests"),
        (
            [{**ADD, "completion": "x", "entry_point": "f()"}],
            "code",
            "rows.jsonl:1: entry_point 'f()' is not a function name",
        ),
        (
            [{**ADD, "completion": "x", "tests": "def check("}],
            "code",
            "rows.jsonl:1: the prompt and its tests",
        ),
        ([{**ADD, "completion": "x", "tests": []}], "code", "rows.jsonl:1: it has no tests"),
        (
            [{**ADD, "completion": "x", "tests": ["add(1, 2)"]}],
            "code",
            "rows.jsonl:1: the tests assert nothing",
        ),
    ],
)
def test_a_row_that_cannot_be_scored_is_named_and_the_others_are_scored(tmp_path, rows, reward, told):
    good = {"accuracy": GOOD, "code": {**ADD, "completion": "x"}}[reward]
    code, out, err = scored(tmp_path, [*rows, good], reward)
    bad = sum(row != "" for row in rows) - 1
    assert code == 0 and [row["status"] == "refused" for row in out] == [i == bad for i in range(len(out))]
    assert out[bad]["value"] is None and out[bad]["detail"] in err and values(out)[-1] == 0
    assert err.startswith(f"r1pipe: 1 of {len(out)} rows could not be scored:\n")
    assert told in err and err.count("\n") == 2


def test_a_file_of_which_nothing_can_be_scored_is_an_error(tmp_path):
    code, out, err = scored(tmp_path, [{}] * 30, "format")
    assert code == 2 and {row["status"] for row in out} == {"refused"} and len(out) == 30
    assert err.count("\n") == 22 and "and 10 more" in err
    code, out, err = scored(tmp_path, [], "format")
    assert (code, out) == (2, []) and "rows.jsonl holds no rows" in err and err.count("\n") == 1


def test_limits_of_programs_are_refused_where_none_is_run(tmp_path):
    code, out, err = scored(tmp_path, [GOOD], "format", cpu_seconds=3.0)
    assert (code, out) == (2, []) and "--cpu-seconds is for --reward code" in err and err.count("\n") == 1


def test_a_missing_file_is_one_line(tmp_path):
    for file in (tmp_path / "none.jsonl", tmp_path):
        options = tmp_path / "options.json"
        script_options.write(ScoreOptions(file, "accuracy", "en"), options)
        line = [sys.executable, SCRIPT, str(options)]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
        assert done.stderr.startswith("r1pipe: ")


@pytest.mark.parametrize("reward", ["accuracy", "code", "format", "language"])
def test_shared_cases(reward, shared, tmp_path):
    """At least 98% as expected, and no wrong answer that earns 1."""
    lines = (shared.parent / "cases/scores.jsonl").read_text("utf-8").splitlines()
    cases = [
        case for case in map(json.loads, lines) if case["reward"] == reward and "note" not in case["row"]
    ]
    others, gifts = [], []
    for language in sorted({case["language"] for case in cases}):
        group = [case for case in cases if case["language"] == language]
        _, verdicts, _ = scored(tmp_path, [case["row"] for case in group], reward, language)
        for case, verdict in zip(group, verdicts, strict=True):
            got = "refused" if verdict["status"] == "refused" else verdict["value"]
            least, most = ("", "") if case["expected"] == "refused" else case["expected"]
            is_expected = got == "refused" if case["expected"] == "refused" else least <= (got or 0) <= most
            others += [] if is_expected and got is not None else [case["id"]]
            gifts += [case["id"]] if most == 0 and got == 1 else []
    assert gifts == []
    assert len(others) <= 0.02 * len(cases), others
