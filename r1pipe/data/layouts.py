"""Layouts of public data sets: which columns hold what, inferred from column names and the first rows.

A layout maps roles to columns; how a column's content is read depends on what it holds (a question may be
text or messages, an answer a text or a list). The table in docs/guide.md lists them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from r1pipe.config.data import LayoutName
from r1pipe.core.errors import DataError
from r1pipe.data.answers import IN_STRUCT
from r1pipe.data.conversations import is_conversation
from r1pipe.data.reading import Row
from r1pipe.rewards.answers.gold import Form
from r1pipe.rewards.programs.cases import loaded
from r1pipe.rewards.programs.tasks import is_code_row

SAMPLED = 100  # values of a column that are looked at
QUESTIONS = ("question", "problem", "prompt", "input", "query", "instruction", "question_stem", "ctx")
ANSWERS = (
    *("answer", "final_answer", "expected_answer", "target", "ground_truth", "gold"),
    *("correct_answer", "answers"),
)
SOLUTIONS = ("solution", "generated_solution", "rationale", "explanation")
RESPONSES = ("response", "completion", "output", "answer", "target")
CONVERSATIONS = ("messages", "conversations", "conversation", "dialogue")
BEFORE_QUESTION = ("body", "context", "passage", "article")
SYSTEM = ("system", "system_prompt")
OPTIONS = ("choices", "options", "endings")
RIGHT_OPTIONS = ("answerkey", "answer_key", "answer_idx", "answer_index", "answer", "gold", "label", "target")
ALTERNATIVES = ("alternatives", "aliases")
FORMS = ("answer_form", "answer_type")
SAFE = ("safe", "is_safe", "is_response_safe")
MARK = "####"


class Table:
    """The columns of a file, whatever their capitals, with the first things that they hold."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = [row.values for row in rows]
        self.columns = {str(name).strip().lower(): name for name in rows[0].values}
        self.columns |= {name: name for name in rows[0].values if name in self.columns}

    def values(self, name: str) -> list[Any]:
        """The first things that a column holds, without what is empty."""
        column = self.columns.get(name)
        found: Iterable[Any] = (row[column] for row in self.rows) if column else ()
        return list(islice((value for value in found if value not in (None, "", [])), SAMPLED))

    def present(self, candidates: Sequence[str]) -> list[str]:
        """The candidates that are columns with something in them."""
        return [name for name in candidates if self.values(name)]

    def first(self, candidates: Sequence[str]) -> str | None:
        """The actual name of the first candidate that is there."""
        return next((self.columns[name] for name in self.present(candidates)), None)

    def one(self, role: str, candidates: Sequence[str]) -> str | None:
        """The actual name of the one candidate that is there. Raises DataError where there are several that
        hold different things."""
        found = self.present(candidates)
        if any(self.values(name) != self.values(found[0]) for name in found[1:]):
            listed = ", ".join(self.columns[name] for name in found)
            raise DataError(f"several columns may be the {role}: {listed}; name it")
        return self.columns[found[0]] if found else None

    def optional(self, **roles: Sequence[str]) -> dict[str, str]:
        """Those of the optional roles that have a column."""
        found = {role: self.first(candidates) for role, candidates in roles.items()}
        return {role: column for role, column in found.items() if column}


Columns = dict[str, str]


def _preferences(table: Table) -> Columns | None:
    chosen, rejected = table.first(["chosen"]), table.first(["rejected"])
    if chosen is None or rejected is None:
        return None
    asked = table.first(["prompt"]) or table.one("question", QUESTIONS) or table.first(CONVERSATIONS)
    found = {"chosen": chosen, "rejected": rejected} | table.optional(system=SYSTEM)
    return found | ({"question": asked} if asked else {})


def _labels(table: Table) -> Columns | None:
    safe = table.first(SAFE)
    if safe is None and table.values("label") and all(isinstance(v, bool) for v in table.values("label")):
        safe = table.columns["label"]  # TRL's unpaired preferences
    response = table.first(RESPONSES)
    if safe is None or response is None or not table.present(QUESTIONS):
        return None
    found = {"question": table.one("question", QUESTIONS) or "", "response": response, "safe": safe}
    return found | table.optional(system=SYSTEM)


def _verl(table: Table) -> Columns | None:
    models = table.values("reward_model")
    if not models or not all(isinstance(model, dict) and "ground_truth" in model for model in models):
        return None
    asked = table.one("question", ["prompt", "question", "problem"])
    truth = f"{table.columns['reward_model']}.ground_truth"
    return {"question": asked, "answer": truth} if asked else None


def is_code(row: Mapping[str, Any]) -> bool:
    """Whether a row is a code task: a list of texts or a struct as its ground truth may hold an answer."""
    truth = loaded(row.get("ground_truth"))
    are_texts = isinstance(truth, list) and not any(
        isinstance(each, Mapping | list) or "assert" in str(each) for each in truth
    )
    if are_texts or (isinstance(truth, Mapping) and not truth.keys().isdisjoint(IN_STRUCT)):
        row = {**row, "ground_truth": None}
    return is_code_row(row)


def _code(table: Table) -> Columns | None:
    return {} if any(is_code(row) for row in table.rows[:SAMPLED]) else None


def _options(table: Table) -> Columns | None:
    options = table.first(OPTIONS)
    if options is None and table.values("a") and table.values("b"):
        letters = "abcdefghij"
        options = " + ".join(table.columns[name] for name in letters if table.values(name))
    labels, lists = table.values("label"), table.values("answers")
    if options is None and labels and lists and _are_indices(labels, lists):
        options = table.columns["answers"]  # ReClor's: one of them is right
    right = table.first(RIGHT_OPTIONS)
    if options is None or right is None:
        return None
    question = table.one("question", QUESTIONS)
    if question is None:
        return None
    found = {"question": _with_passage(table, question), "options": options, "answer": right}
    return found | table.optional(system=SYSTEM)


def _are_indices(labels: list[Any], lists: list[Any]) -> bool:
    return all(isinstance(each, list) for each in lists) and all(str(label).isdecimal() for label in labels)


def _with_passage(table: Table, question: str) -> str:
    """The question, after the passage or the story that it is about."""
    before = [name for name in table.present(BEFORE_QUESTION) if isinstance(table.values(name)[0], str)]
    return " + ".join([*(table.columns[name] for name in before), question])


def _table(table: Table) -> Columns | None:
    if table.present(["instruction"]) and table.present(["output"]):
        return None  # Alpaca's
    question = table.one("question", QUESTIONS)
    if question is None:
        question = next((table.columns[n] for n in table.present(CONVERSATIONS)), None)
    solution = table.first(SOLUTIONS)
    answer = (
        table.one("answer", [name for name in ANSWERS if table.columns.get(name) != question]) or solution
    )
    if question is None or answer is None:
        return None
    found = {"question": _with_passage(table, question), "answer": answer}
    if solution and all(isinstance(each, str) for each in table.values(solution.strip().lower())):
        found["solution"] = solution
    forms = [name for name in FORMS if {str(each) for each in table.values(name)} <= {*Form}]
    return found | table.optional(alternatives=ALTERNATIVES, form=forms, system=SYSTEM)


def _conversation(table: Table) -> Columns | None:
    there = [name for name in table.present(CONVERSATIONS) if is_conversation(table.values(name)[0])]
    column = table.one("conversation", there)
    return {"conversation": column} | table.optional(system=SYSTEM) if column else None


def _alpaca(table: Table) -> Columns | None:
    instruction, output = table.first(["instruction"]), table.first(["output", "response"])
    if instruction is None or output is None:
        return None
    asked = " + ".join(filter(None, [instruction, table.first(["input", "context"])]))
    return {"question": asked, "response": output} | table.optional(history=["history"], system=SYSTEM)


def _instructions(table: Table) -> Columns | None:
    response = table.one("response", RESPONSES)
    asked = table.one("question", [name for name in QUESTIONS if table.columns.get(name) != response])
    if response is None or asked is None:
        return None
    return {"question": asked, "response": response} | table.optional(system=SYSTEM)


@dataclass(frozen=True)
class Layout:
    """How rows of one kind of data lie in a file."""

    name: LayoutName
    kind: str  # reasoning, general, preferences or labels
    columns: Columns  # role -> column
    answer_after: str | None = None


KINDS = {"reasoning": "problems or other data", "general": "instructions", "preferences": "pairs"}
KINDS |= {"labels": "labelled responses"}
# Name -> kind, and the columns where a file has the layout; the first that fits is taken.
LAYOUTS: dict[LayoutName, tuple[str, Callable[[Table], Columns | None]]] = {
    "preferences": ("preferences", _preferences),
    "labels": ("labels", _labels),
    "verl": ("reasoning", _verl),
    "code": ("reasoning", _code),
    "options": ("reasoning", _options),
    "table": ("reasoning", _table),
    "conversation": ("general", _conversation),
    "alpaca": ("general", _alpaca),
    "instructions": ("general", _instructions),
}


def find_layout(
    rows: Sequence[Row], kind: str, name: LayoutName | None = None, given: Mapping[str, str] | None = None
) -> Layout:
    """The layout of rows that are to be `kind`; problems may turn out to be of another kind. `name`: the
    layout that they must have; `given`: columns that are known to be in it. Raises DataError without a place.
    """
    table = Table(rows)
    for each, (gives, columns_of) in LAYOUTS.items():
        if name not in (None, each) or kind not in (gives, "reasoning"):
            continue
        try:
            columns = columns_of(table)
        except DataError:
            if not given:
                raise
            columns = None
        if columns is not None or given:
            columns = {**(columns or {}), **(given or {})}
            mark = _mark(table, columns)
            solution = {"solution": columns["answer"]} if mark else {}
            return Layout(each, gives, {**solution, **columns}, mark)
    listed = ", ".join(map(str, table.columns.values()))
    if name and kind not in (LAYOUTS[name][0], "reasoning"):
        raise DataError(f"layout {name} is for data.{LAYOUTS[name][0]}, not data.{kind}; name the columns")
    lacking = f"layout {name}" if name else f"known layout of {KINDS[kind]}"
    raise DataError(f"its columns ({listed}) are no {lacking}; name the columns")


def _mark(table: Table, columns: Columns) -> str | None:
    """GSM8K's mark before the final answer, where every row has it."""
    answers = table.values(columns.get("answer", "").strip().lower())
    return MARK if answers and all(isinstance(a, str) and MARK in a for a in answers) else None
