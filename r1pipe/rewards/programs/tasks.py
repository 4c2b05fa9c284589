"""Code tasks from rows of data files, in the layouts that public data sets have.

Sample of a task (Prompt.checker): {"entry_point": "f", "tests": [[[2], 4], [[-1], -2]]}. The form of `tests`
says what is run (cases.py): calls of the entry point, a program with its standard input, or assert lines.
Further keys: `prompt` (Python text before the program: HumanEval's prompt, MBPP's imports), `time_limit_s`
(the task's own), `either` (cases.Cases).
"""

import ast
import builtins
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from r1pipe.core import python_source
from r1pipe.core.errors import DataError
from r1pipe.rewards.programs.cases import Cases, join_cases, loaded, read_cases, unpacked

Row = Mapping[str, Any]

_SECONDS = re.compile(r"\d+(?:\.\d+)?")
_STREAMS = "Write a Python program that reads standard input and writes to standard output."
_STARTER = "Start from this code:\n```python\n{}\n```"


def _is_given(value: Any) -> bool:
    return value is not None and value != "" and value != [] and value != {}


def read_task(row: Row) -> dict[str, Any]:
    """The checker of a row (Prompt.checker), plain JSON. Raises DataError saying what the row lacks."""
    task = _layout(row)[1](row)
    check_task(task)
    return task


def is_code_row(row: Row) -> bool:
    """Whether the row's columns are those of a code task; its tests are not looked at."""
    return any(_has(row, mark) for marks, _, _ in LAYOUTS for mark in marks)


def question_of(row: Row) -> str:
    """What a model is asked, from the columns of the row's layout. Raises DataError where they are empty."""
    question = _layout(row)[2](row).strip()
    if not question:
        raise DataError("the row asks nothing; name the column with the question")
    return question


def check_task(task: Row) -> None:
    """Raises DataError where a task's tests are missing or cannot be run."""
    tests, entry = task.get("tests"), task.get("entry_point", "")
    if not tests or not isinstance(tests, list | str):
        raise DataError("it has no tests; write one")
    kind = kind_of(tests)
    if kind == "programs":
        return
    if not isinstance(entry, str) or not entry.isidentifier():
        raise DataError(f"entry_point {entry!r} is not a function name; give one")
    if kind == "asserts":
        text = tests if isinstance(tests, str) else "\n".join(tests)
        if not parsed(f"{task.get('prompt', '')}\n{text}"):
            raise DataError("the prompt and its tests are not Python; correct them")
        if "assert" not in text:
            raise DataError("the tests assert nothing; write one assert")
    elif not all(
        isinstance(t, list | tuple) and len(t) == 2 and isinstance(t[0], list | tuple) for t in tests
    ):
        raise DataError("tests is no list of [[arguments...], expected]; write one test")


def kind_of(tests: Any) -> str:
    """What tests in the form of `cases` are: "asserts", "programs" or "calls"."""
    if isinstance(tests, str) or all(isinstance(each, str) for each in tests):
        return "asserts"
    pairs = [each for each in tests if isinstance(each, list | tuple)]
    are_texts = all(len(each) == 2 and all(isinstance(part, str) for part in each) for each in pairs)
    return "programs" if len(pairs) == len(tests) and are_texts else "calls"


def parsed(text: str) -> list[ast.stmt]:
    """A text's statements; none where it is not Python."""
    try:
        return python_source.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []


def _task(cases: Cases, entry_point: str = "", context: Any = "", limit: Any = None) -> dict[str, Any]:
    """A checker. A prompt that is no Python is a question and no part of a program; so is a single word."""
    statements = parsed(context) if isinstance(context, str) else []
    context = context if any(not isinstance(each, ast.Expr) for each in statements) else ""
    task = {"prompt": context, "entry_point": entry_point or cases.function, "tests": cases.tests}
    if kind_of(cases.tests or []) == "programs":
        task = {"entry_point": "", "tests": cases.tests}
    seconds = _seconds(limit)
    return task | ({"time_limit_s": seconds} if seconds else {}) | ({"either": True} if cases.either else {})


def _seconds(limit: Any) -> float:
    """A time limit: 2.0, "2.0 seconds" (TACO) or {"seconds": 2, "nanos": 0} (CodeContests); 0 for none."""
    if isinstance(limit, Mapping):
        return _seconds(limit.get("seconds")) + _seconds(limit.get("nanos")) / 1e9
    found = _SECONDS.search(str(limit or ""))
    return float(found[0]) if found else 0.0


def _own(row: Row) -> dict[str, Any]:
    """r1pipe's own {"prompt", "tests", "entry_point"}, and DeepCoder's `tests`."""
    cases = read_cases(row["tests"])
    return _task(cases, row.get("entry_point") or "", row.get("prompt"), row.get("time_limit"))


def _humaneval(row: Row) -> dict[str, Any]:
    return _task(Cases(str(row["test"])), row["entry_point"], row.get("prompt"))


def _mbpp(row: Row) -> dict[str, Any]:
    tests = loaded(row["test_list"])
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise DataError("test_list is no list of assert lines; correct it")
    context = row.get("test_setup_code") or loaded(row.get("test_imports")) or ""
    context = "\n".join(map(str, context)) if isinstance(context, list) else context
    entry = row.get("entry_point") or _asserted(tests, str(row.get("code") or ""))
    return _task(Cases(tests), entry, context)


def _asserted(tests: Sequence[str], solution: str) -> str:
    """The function that the first test calls: one that the solution defines, else one that Python lacks."""
    try:
        test, written = python_source.parse("\n".join(tests)), python_source.parse(solution)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise DataError("test_list or code is not Python; correct it") from None
    calls = (node.func for line in test.body for node in ast.walk(line) if isinstance(node, ast.Call))
    names = [call.id for call in calls if isinstance(call, ast.Name) and not hasattr(builtins, call.id)]
    defined = {node.name for node in ast.walk(written) if isinstance(node, ast.FunctionDef)}
    names = [name for name in names if name in defined] or names
    if not names:
        raise DataError("test_list calls no function; write an assert that does")
    return names[0]


def _livecodebench(row: Row) -> dict[str, Any]:
    parts = []
    for column in ("public_test_cases", "private_test_cases"):
        value = loaded(row.get(column))
        value = unpacked(value) if isinstance(value, str) and value else value
        if _is_given(value):
            parts.append(read_cases(value))
    metadata = loaded(row.get("metadata"))
    name = metadata.get("func_name") if isinstance(metadata, Mapping) else ""
    return _task(join_cases(parts), name or "", limit=row.get("time_limit"))


def _apps(row: Row) -> dict[str, Any]:
    value = loaded(row["input_output"])
    if not isinstance(value, Mapping):
        raise DataError("input_output is no {inputs, outputs}; leave the row out")
    return _task(read_cases(value), limit=row.get("time_limit"))


def _codeforces(row: Row) -> dict[str, Any]:
    """open-r1/codeforces, and CodeContests' columns of the same problems."""
    for column in ("generated_checker", "interaction_format"):
        if _is_given(row.get(column)):
            raise DataError(f"it needs a judge of its own ({column}); leave the row out")
    if row.get("input_mode") == "file":
        raise DataError("its programs read a file (input_mode); leave the row out")
    columns = [name for name in ("official_tests", *_CODE_CONTESTS) if _is_given(row.get(name))]
    values = [loaded(row[name]) for name in columns or ["examples"]]
    parts = [part for part in map(read_cases, values) if part.tests]
    return _task(join_cases(parts or [Cases([])]), limit=row.get("time_limit"))


def _verification(row: Row) -> dict[str, Any]:
    column = next(name for name in _VERIFICATION if _is_given(row.get(name)))
    return _task(read_cases(row[column]), row.get("entry_point") or "", limit=row.get("time_limit"))


def _joined(row: Row, *columns: str) -> str:
    return "\n\n".join(str(row[name]).strip() for name in columns if _is_given(row.get(name)))


def _first(row: Row, *columns: str) -> str:
    return next((str(row[name]) for name in columns if _is_given(row.get(name))), "")


def _plain_question(row: Row) -> str:
    return _first(row, "question", "problem", "prompt", "question_content", "description")


def _mbpp_question(row: Row) -> str:
    tests = loaded(row["test_list"])
    lines = tests if isinstance(tests, list) else []
    text = _first(row, "text", "prompt")
    return "\n".join([text, "Your code should pass these tests:", *map(str, lines)]) if text else ""


def _contest_question(row: Row) -> str:
    """Question and starter code, or how the program is given its input."""
    question = _plain_question(row)
    starter = str(row.get("starter_code") or "").strip()
    return f"{question}\n\n{_STARTER.format(starter) if starter else _STREAMS}" if question else ""


def _codeforces_question(row: Row) -> str:
    parts = {"Input": "input_format", "Output": "output_format", "Note": "note"}
    text = _joined(row, "title", "description")
    for heading, column in parts.items():
        if _is_given(row.get(column)):
            text += f"\n\n{heading}\n{str(row[column]).strip()}"
    examples = loaded(row.get("examples"))
    for example in examples if isinstance(examples, list) else []:
        if isinstance(example, Mapping):
            text += f"\n\nExample\n{example.get('input')}\n->\n{example.get('output')}"
    return f"{text}\n\n{_STREAMS}" if text else ""


_CODE_CONTESTS = ("public_tests", "private_tests", "generated_tests")
_VERIFICATION = ("verification_info", "ground_truth", "test_cases")
# The columns that tell a layout (any of the marks), how its task is read, and what it asks. The first that
# fits is taken.
LAYOUTS: list[tuple[tuple[str, ...], Callable[[Row], dict[str, Any]], Callable[[Row], str]]] = [
    (("test_list",), _mbpp, _mbpp_question),
    (("public_test_cases", "private_test_cases"), _livecodebench, _contest_question),
    (("input_output",), _apps, _contest_question),
    (("official_tests", *_CODE_CONTESTS), _codeforces, _codeforces_question),
    (_VERIFICATION, _verification, _plain_question),
    (("tests",), _own, _plain_question),
    (("test+entry_point",), _humaneval, _plain_question),
    (("examples+time_limit",), _codeforces, _codeforces_question),
]


def _layout(row: Row) -> tuple[tuple[str, ...], Callable[[Row], dict[str, Any]], Callable[[Row], str]]:
    for layout in LAYOUTS:
        if any(_has(row, mark) for mark in layout[0]):
            return layout
    known = ", ".join(mark for marks, _, _ in LAYOUTS for mark in marks)
    raise DataError(f"it has no tests: none of the columns {known} is there, or all are empty")


def _has(row: Row, mark: str) -> bool:
    """Whether the row has the columns of a mark; a text alone is no ground truth of a code task."""
    if mark == "ground_truth":
        return _is_given(row.get(mark)) and isinstance(loaded(row[mark]), list | Mapping)
    return all(_is_given(row.get(column)) for column in mark.split("+"))
