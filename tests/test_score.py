"""`r1pipe score`: a verdict a row."""

import json
import subprocess
import sys

import pytest

from r1pipe.cli import commands as cli
from r1pipe.core.paths import stages_dir
from r1pipe.launch import job as launch

SCRIPT = str(stages_dir() / "score.py")
ADD = {
    "prompt": 'def add(a, b):\n    """The sum."""\n',
    "entry_point": "add",
    "tests": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
}


def scored(folder, rows, *words):
    """Exit code, the verdicts, and standard error; a row that is text is written as it is."""
    file = folder / "rows.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
    done = subprocess.run(
        [sys.executable, SCRIPT, str(file), *words], capture_output=True, text=True, check=False
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
    code, out, err = scored(tmp_path, rows, "--reward", "accuracy")
    assert (code, err) == (0, "") and values(out) == [1, 0, 1, 1, 0, 0]
    assert all(set(row) == {"status", "value", "detail"} and row["status"] == "scored" for row in out)


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
    code, out, err = scored(tmp_path, rows, "--reward", "code")
    assert (code, err) == (0, "") and values(out) == [1, 1, 1, 1, 1, 0, 0, 0, 0]
    assert all(row["status"] == "scored" for row in out)


def test_what_has_no_verdict_has_no_value(tmp_path):
    beyond = {**ADD, "tests": "import nowhere_at_all, socket\n" + ADD["tests"], "completion": "return a + b"}
    hard = {"question": "?", "answer": r"\sqrt{2}", "completion": r"\boxed{9^{9^{9^9}}}"}
    code, [verdict], _ = scored(tmp_path, [hard], "--reward", "accuracy")
    assert code == 0 and verdict["status"] == "verifier_failed" and verdict["value"] is None
    code, [verdict], _ = scored(tmp_path, [beyond], "--reward", "code")
    assert code == 0 and verdict["status"] == "verifier_failed" and verdict["value"] is None


def test_format_and_language(tmp_path):
    rows = [
        {"question": "?", "answer": "1", "completion": "<think>\n先算 add\n</think>\n\nThe answer is 1."},
        {"question": "?", "answer": "1", "completion": "The answer is 1."},
    ]
    assert values(scored(tmp_path, rows, "--reward", "format")[1]) == [1, 0]
    assert values(scored(tmp_path, rows, "--reward", "language", "--language", "zh")[1])[0] == pytest.approx(
        2 / 3
    )
    assert values(scored(tmp_path, rows, "--reward", "language")[1])[0] == pytest.approx(1 / 3)


GOOD = {"question": "?", "answer": "1", "completion": "x"}


@pytest.mark.parametrize(
    ("rows", "reward", "told"),
    [
        ([GOOD, "{"], "accuracy", "rows.jsonl line 2: not JSON"),
        ([GOOD, "", "[1]"], "accuracy", "rows.jsonl line 3: no JSON object"),
        (["\udcff"], "accuracy", "rows.jsonl line 1: not JSON"),
        (["[" * 100000], "accuracy", "rows.jsonl line 1: nested too deeply"),
        ([{"question": "?", "answer": "1"}], "accuracy", "line 1: completion is missing"),
        ([{**GOOD, "answer": None}], "accuracy", "line 1: answer is missing"),
        ([{**GOOD, "completion": 3}], "accuracy", "line 1: completion is no text"),
        ([{**GOOD, "answer": [1]}], "accuracy", "line 1: answer is no text"),
        (
            [GOOD, {**GOOD, "answer": "n/a ???"}],
            "accuracy",
            "line 2: the gold answer 'n/a ???' does not parse",
        ),
        ([{**GOOD, "answer": " "}], "accuracy", "line 1: the gold answer is empty"),
        ([GOOD], "code", "line 1: prompt is missing"),
        ([{**ADD, "completion": "x", "entry_point": "f()"}], "code", "line 1: checker.entry_point"),
        ([{**ADD, "completion": "x", "tests": "def check("}], "code", "line 1: the prompt and its tests"),
        ([{**ADD, "completion": "x", "tests": []}], "code", "line 1: checker.tests"),
        ([{**ADD, "completion": "x", "tests": ["add(1, 2)"]}], "code", "line 1: the tests assert nothing"),
        ([], "accuracy", "rows.jsonl holds no rows"),
    ],
)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, rows, reward, told):
    code, out, err = scored(tmp_path, rows, "--reward", reward)
    assert (code, out) == (2, []) and told in err and err.count("\n") == 1


def test_a_missing_file_and_a_wrong_reward_too(tmp_path):
    missing, folder = str(tmp_path / "none.jsonl"), str(tmp_path)
    for words in ([missing, "accuracy"], [folder, "accuracy"], [folder, "accuracie"]):
        line = [sys.executable, SCRIPT, words[0], "--reward", words[1]]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


def test_the_verb_hands_the_file_to_its_script(monkeypatch, capsys):
    called = []
    monkeypatch.setattr(launch, "script", lambda name, words: called.append([name, *words]) or 0)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["r1pipe", "score", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code

    assert call("rows.jsonl", "--reward", "language", "--language", "zh") == 0
    assert called == [["score.py", "--reward=language", "--language=zh", "--", "rows.jsonl"]]
    assert call("rows.jsonl", "--reward", "accuracie") == 2
    assert "'accuracy', 'code', 'format', 'language'" in capsys.readouterr().err


def test_it_needs_nothing_slow(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(GOOD))
    code = (
        f"import runpy, sys; sys.argv = ['score.py', {str(file)!r}, '--reward', 'accuracy']\n"
        f"runpy.run_path({SCRIPT!r}, run_name='__main__')\n"
        "print({'torch', 'hydra', 'mlflow', 'sympy', 'datasets', 'typer'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
