"""Code tasks from rows of data files: every public layout in its own shape, and rows that cannot be used."""

import base64
import json
import os
import pickle
import zlib

import pytest

from r1pipe.core.errors import DataError
from r1pipe.rewards.programs import cases
from r1pipe.rewards.programs.tasks import check_task, is_code_row, kind_of, question_of, read_task


def packed(value, dump=pickle.dumps):
    return base64.b64encode(zlib.compress(dump(value))).decode()


HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'from typing import List\n\n\ndef f(x: int) -> int:\n    """Twice x."""\n',
    "entry_point": "f",
    "canonical_solution": "    return 2 * x\n",
    "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate(2) == 4\n",
}
MBPP = {
    "task_id": 2,
    "text": "Write a function to find the shared elements.",
    "code": "def other(): pass\ndef similar(a, b): return tuple(set(a) & set(b))",
    "test_list": ["assert set(similar((3, 4), (5, 4))) == set((4,))", "assert other() is None"],
    "test_setup_code": "",
    "challenge_test_list": [],
}
SANITIZED_MBPP = {
    "prompt": "Write a function for the area.",
    "code": "def area(r): ...",
    "test_imports": ["import math"],
    "test_list": ["assert math.isclose(area(1), 3.14159, rel_tol=0.01)"],
}
APPS = {
    "question": "Double it.",
    "input_output": '{"inputs": ["3\\n"], "outputs": ["6\\n"]}',
    "starter_code": "",
}
APPS_CALLS = {
    "question": "Double it.",
    "input_output": {"fn_name": "f", "inputs": [[2], [3]], "outputs": [[4], [6]]},
    "starter_code": "def f(x):\n\t",
}
TACO = APPS | {"time_limit": "2.0 seconds", "memory_limit": "256.0 megabytes"}
CODEFORCES = {
    "title": "A. Double",
    "description": "Double the number.",
    "input_format": "One integer.",
    "output_format": "Its double.",
    "interaction_format": None,
    "note": None,
    "time_limit": 2.0,
    "memory_limit": 256.0,
    "examples": [{"input": "3", "output": "6"}],
    "official_tests": [{"input": "3\n", "output": "6\n"}, {"input": "5\n", "output": "10\n"}],
    "input_mode": "stdio",
    "generated_checker": None,
}
CODE_CONTESTS = {
    "description": "Double the number.",
    "public_tests": {"input": ["3\n"], "output": ["6\n"]},
    "private_tests": {"input": [], "output": []},
    "generated_tests": {"input": ["5\n"], "output": ["10\n"]},
    "time_limit": {"seconds": 1, "nanos": 500_000_000},
}
LIVECODEBENCH = {
    "question_title": "Double",
    "question_content": "Double the number.",
    "starter_code": "",
    "public_test_cases": '[{"input": "3\\n", "output": "6\\n", "testtype": "stdin"}]',
    "private_test_cases": packed('[{"input": "5\\n", "output": "10\\n", "testtype": "stdin"}]'),
    "metadata": "{}",
}
LIVECODEBENCH_CLASS = {
    "question_content": "Add a number to each.",
    "starter_code": "class Solution:\n    def add(self, xs: List[int], y: int) -> List[int]:\n        ",
    "public_test_cases": '[{"input": "[1, 2]\\n3", "output": "[4, 5]", "testtype": "functional"}]',
    "private_test_cases": '[{"input": "[]\\n1", "output": "[]", "testtype": "functional"}]',
    "metadata": '{"func_name": "add"}',
}
VERIFIABLE = {
    "problem": "Double it, from standard input.",
    "verification_info": {
        "language": "python",
        "test_cases": [{"type": "stdin_stdout", "fn_name": None, "input": "3\n", "output": "6\n"}],
    },
}
PRIME = {
    "prompt": "Double it.",
    "verification_info": json.dumps(
        {"test_cases": [{"type": "function_call", "fn_name": "f", "input": [2], "output": [4]}]}
    ),
}
GROUND_TRUTH = {"prompt": "Double it.", "ground_truth": '{"inputs": ["3\\n"], "outputs": ["6\\n"]}'}
DEEPCODER = {
    "problem": "Double it.",
    "starter_code": "",
    "tests": '[{"input": "3", "output": "6", "testtype": "stdin", "metadata": {"func_name": null}}]',
}
OWN = {"prompt": "", "entry_point": "f", "tests": [[[2], 4], [[-1], -2]]}
OWN_STREAMS = {"prompt": "Read n and print 2n.", "entry_point": "main", "tests": [["3\n", "6\n"]]}
LINES = {"input": ["3", "4"], "output": 6}
NO_JSON = '[{"input": "x", "output": "[]", "testtype": "functional"}]'


@pytest.mark.parametrize(
    ("row", "task"),
    [
        (HUMANEVAL, {"prompt": HUMANEVAL["prompt"], "entry_point": "f", "tests": HUMANEVAL["test"]}),
        (MBPP, {"prompt": "", "entry_point": "similar", "tests": MBPP["test_list"]}),
        (
            SANITIZED_MBPP,
            {"prompt": "import math", "entry_point": "area", "tests": SANITIZED_MBPP["test_list"]},
        ),
        (APPS, {"entry_point": "", "tests": [["3\n", "6\n"]]}),
        (APPS_CALLS, {"prompt": "", "entry_point": "f", "tests": [[[2], [4]], [[3], [6]]], "either": True}),
        (TACO, {"entry_point": "", "tests": [["3\n", "6\n"]], "time_limit_s": 2.0}),
        (CODEFORCES, {"entry_point": "", "tests": [["3\n", "6\n"], ["5\n", "10\n"]], "time_limit_s": 2.0}),
        (
            CODEFORCES | {"official_tests": []},
            {"entry_point": "", "tests": [["3", "6"]], "time_limit_s": 2.0},
        ),
        (CODE_CONTESTS, {"entry_point": "", "tests": [["3\n", "6\n"], ["5\n", "10\n"]], "time_limit_s": 1.5}),
        (LIVECODEBENCH, {"entry_point": "", "tests": [["3\n", "6\n"], ["5\n", "10\n"]]}),
        (
            LIVECODEBENCH_CLASS,
            {"prompt": "", "entry_point": "add", "tests": [[[[1, 2], 3], [4, 5]], [[[], 1], []]]},
        ),
        (VERIFIABLE, {"entry_point": "", "tests": [["3\n", "6\n"]]}),
        (PRIME, {"prompt": "", "entry_point": "f", "tests": [[[2], [4]]], "either": True}),
        (GROUND_TRUTH, {"entry_point": "", "tests": [["3\n", "6\n"]]}),
        (DEEPCODER, {"entry_point": "", "tests": [["3", "6"]]}),
        (DEEPCODER | {"tests": str([LINES])}, {"entry_point": "", "tests": [["3\n4", "6"]]}),
        (OWN, OWN),
        (OWN | {"tests": json.dumps(OWN["tests"])}, OWN),
        (OWN | {"prompt": "Double"}, OWN),  # a question, not the program's beginning
        (OWN_STREAMS, {"entry_point": "", "tests": [["3\n", "6\n"]]}),
        (OWN | {"tests": [{"input": [2], "output": 4}]}, {**OWN, "tests": [[[2], 4]], "either": True}),
        (OWN | {"tests": [{"input": [2], "output": None}]}, {**OWN, "tests": [[[2], None]], "either": True}),
        (OWN_STREAMS | {"tests": [LINES]}, {"entry_point": "", "tests": [["3\n4", "6"]]}),
    ],
)  # fmt: skip
def test_every_layout_is_read(row, task):
    assert is_code_row(row) and read_task(row) == task
    assert json.loads(json.dumps(task)) == task  # rejection sampling keeps it as JSON
    check_task(task)


def test_rows_of_other_data_are_no_code_rows():
    for row in (
        {"question": "6 * 7?", "answer": "42"},
        {"prompt": "6 * 7?", "ground_truth": "42"},
        {"question": "?", "answer": "1", "tests": None, "test_list": []},
        {"instruction": "?", "output": "x", "examples": "one, two", "test": "yes"},
        {},
    ):
        assert not is_code_row(row)
        with pytest.raises(DataError, match=r"^it has no tests: none of the columns test_list, .* is there"):
            read_task(row)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (OWN | {"tests": [[2, 4]]}, "tests is no list of"),
        (OWN | {"tests": [[[2], 4, 5]]}, "a test is no"),
        (OWN | {"tests": [3]}, "a test is no"),
        (OWN | {"tests": 3}, "it has no tests"),
        (OWN | {"tests": "[[2"}, "are not Python"),
        (OWN | {"tests": ["f(2)"]}, "assert nothing"),
        (OWN | {"entry_point": "f()"}, "'f\\(\\)' is not a function name"),
        (OWN | {"entry_point": None}, "'' is not a function name"),
        (HUMANEVAL | {"entry_point": 3}, "3 is not a function name"),
        (MBPP | {"test_list": ["assert ("]}, "not Python"),
        (MBPP | {"test_list": ["assert 1 == 1"]}, "calls no function"),
        (MBPP | {"test_list": "assert f(2) == 4"}, "no list of assert lines"),
        (APPS | {"input_output": "none"}, "input_output is no"),
        (APPS | {"input_output": {"inputs": ["1"]}}, "no lists `inputs` and `outputs`"),
        (APPS | {"input_output": {"inputs": ["1"], "outputs": []}}, "1 inputs but 0 outputs"),
        (APPS | {"input_output": {"inputs": [], "outputs": []}}, "it has no tests"),
        (CODEFORCES | {"generated_checker": "def check(): ..."}, "a judge of its own \\(generated_checker"),
        (CODEFORCES | {"interaction_format": "Ask."}, "a judge of its own \\(interaction_format"),
        (CODEFORCES | {"input_mode": "file"}, "read a file"),
        (LIVECODEBENCH_CLASS | {"metadata": "{}"}, "'' is not a function name"),
        (LIVECODEBENCH_CLASS | {"private_test_cases": NO_JSON}, "test 1 is not JSON"),
        (VERIFIABLE | {"verification_info": {"language": "cpp", "test_cases": [1]}}, "tests are for cpp"),
        (VERIFIABLE | {"verification_info": {"test_cases": [{"input": "3"}]}}, "test 1 lacks its input"),
        (GROUND_TRUTH | {"ground_truth": [LINES, LINES | {"fn_name": "f"}]}, "keep one form"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_refused_in_one_line(row, told):
    with pytest.raises(DataError, match=told) as refused:
        read_task(row)
    assert "\n" not in str(refused.value)


class Command:
    """What a hostile pickle would run."""

    def __reduce__(self):
        return os.system, ("touch /tmp/r1pipe-unpickled",)


@pytest.mark.parametrize("protocol", range(6))
def test_packed_tests_are_read_at_any_protocol(protocol):
    value = ["ä", "x" * 70_000]
    assert cases.unpacked(packed(json.dumps(value), lambda text: pickle.dumps(text, protocol))) == value


@pytest.mark.parametrize(
    "text",
    [
        packed(Command()),
        packed(["a", "b"]),
        packed(b"x"),
        packed("a")[:-4],
        packed("x", lambda value: b"\x80\x04"),
        base64.b64encode(b"plain").decode(),
        "neither JSON nor packed",
    ],
)
def test_nothing_but_a_string_is_read_from_a_pickle(text):
    with pytest.raises(DataError, match="neither JSON nor a packed list"):
        read_task(LIVECODEBENCH | {"private_test_cases": text})
    assert not os.path.exists("/tmp/r1pipe-unpickled")


def test_packed_tests_do_not_fill_the_memory(monkeypatch):
    monkeypatch.setattr(cases, "MAX_BYTES", 1 << 20)
    with pytest.raises(DataError, match="more than 1 MB"):
        read_task(LIVECODEBENCH | {"private_test_cases": packed("x" * (4 << 20))})


def test_questions_come_from_the_layouts_own_columns():
    assert question_of(HUMANEVAL) == HUMANEVAL["prompt"].strip()
    assert question_of(MBPP).splitlines()[1:] == ["Your code should pass these tests:", *MBPP["test_list"]]
    assert "standard input" in question_of(APPS) and "standard input" not in question_of(APPS_CALLS)
    assert question_of(APPS_CALLS).endswith("```python\ndef f(x):\n```")
    assert "class Solution:" in question_of(LIVECODEBENCH_CLASS)
    asked = question_of(CODEFORCES)
    assert all(
        part in asked for part in ("A. Double", "Input\nOne integer.", "Output\nIts double.", "3\n->\n6")
    )
    assert question_of(PRIME) == "Double it."
    with pytest.raises(DataError, match="asks nothing"):
        question_of(OWN)


def test_the_form_of_tests_says_what_is_run():
    assert kind_of([[[2], 4]]) == kind_of([[["a"], "b"]]) == "calls"
    assert kind_of([["3", "6"]]) == "programs"
    assert kind_of("assert f(2) == 4") == kind_of(["assert f(2) == 4"]) == "asserts"


def test_what_is_no_time_limit_is_none():
    task = read_task(CODE_CONTESTS | {"time_limit": {"seconds": "soon", "nanos": None}})
    assert "time_limit_s" not in task


def test_imports_that_are_no_text_end_nothing():
    assert read_task(SANITIZED_MBPP | {"test_imports": [1]})["entry_point"] == "area"
