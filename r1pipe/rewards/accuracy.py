"""Accuracy: is the final answer right? One checker per task, in one table.

Only the summary counts: a right number inside <think> earns nothing. Sample: Prompt(task="word", answer="42")
and "<think>\\n6*7=42\\n</think>\\n\\nThe answer is 42." scores 1.
"""

import ast
import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from r1pipe.chat.template import THINK, parse
from r1pipe.core import python_source
from r1pipe.core.errors import DataError
from r1pipe.core.types import CURATED, GENERAL_TASKS, Completion, Prompt, Score, Status
from r1pipe.rewards import drop, symbolic
from r1pipe.rewards.answers import check as answers
from r1pipe.rewards.answers.gold import Gold, formulas_in, read_gold
from r1pipe.rewards.answers.notation import tidy
from r1pipe.rewards.answers.reading import last_stated
from r1pipe.rewards.judge.prompts import read_verdict
from r1pipe.rewards.programs.check import check_program, check_program_gold, unparsed, vote_of_program
from r1pipe.runs import heartbeat

_OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
}
_MAX_EXPRESSION = 200  # characters


def gold_of(prompt: Prompt) -> Gold:
    """Raises DataError."""
    checker = prompt.checker
    options = tuple((str(letter), str(text)) for letter, text in checker.get("options", {}).items())
    form = checker.get("answer_form", "")
    gold = read_gold(prompt.answer, form, options)
    others = tuple(read_gold(str(other), form, options) for other in checker.get("alternatives", ()))
    return replace(gold, alternatives=(*gold.alternatives, *others)) if others else gold


def check_answer(prompt: Prompt, summary: str) -> Score:
    """The stated final answer against the gold one, by the gold answer's form."""
    return answers.check(gold_of(prompt), summary)


def check_countdown(prompt: Prompt, summary: str) -> Score:
    """The stated expression uses each given number once, with + - * and parentheses, and makes the target."""
    expression = last_stated(summary)
    if expression is None:
        return Score(0.0, detail="the summary states no expression")
    tree = _parse_expression(expression)
    if tree is None:
        return Score(0.0, detail=f"{expression!r} is not an expression of integers with + - * ( )")
    value, used = _evaluate(tree.body)
    if Counter(used) != Counter(prompt.checker["numbers"]):
        return Score(0.0, detail=f"uses {sorted(used)}, not {sorted(prompt.checker['numbers'])}")
    return Score(float(value == prompt.checker["target"]), detail=f"makes {value}")


def check_label(prompt: Prompt, summary: str) -> Score:
    """The verdict in a judge's answer against the right one."""
    verdict = read_verdict(
        summary, {label: float(label == prompt.answer) for label in prompt.checker["labels"]}
    )
    return Score(verdict or 0.0, detail="no verdict" if verdict is None else "")


def _parse_expression(text: str) -> ast.Expression | None:
    """The syntax tree of an expression of integers with + - * ( ), or None; nothing is ever executed."""
    text = tidy(text).split("=")[0].replace("\\times", "*").strip()
    if len(text) > _MAX_EXPRESSION or not re.fullmatch(r"[\d\s+*()-]+", text):
        return None
    try:
        tree = python_source.parse_expression(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    nodes = (ast.Expression, ast.BinOp, ast.Constant, *_OPERATORS)
    return tree if all(isinstance(node, nodes) for node in ast.walk(tree)) else None


def _evaluate(node: ast.expr) -> tuple[int, list[int]]:
    """The value of an expression that `_parse_expression` let through, and the integers in it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value, [node.value]
    assert isinstance(node, ast.BinOp)
    (left, left_used), (right, right_used) = _evaluate(node.left), _evaluate(node.right)
    return _OPERATORS[type(node.op)](left, right), left_used + right_used


def check_gym(prompt: Prompt, summary: str) -> Score:
    """The verdict of reasoning-gym's own scorer; partial credit is not a right answer."""
    answer = last_stated(summary)
    if answer is None:
        return Score(0.0, detail="the summary states no final answer")
    return symbolic.score_gym(prompt.checker["reasoning_gym"], prompt.checker["entry"], answer)


def _check_answer_gold(prompt: Prompt) -> None:
    try:
        gold = gold_of(prompt)
    except DataError as error:
        raise DataError(f"{prompt.id}: {error}") from None
    for formula in formulas_in(gold):
        if not symbolic.parses(formula):
            answer = f"the gold answer {prompt.answer!r}"
            raise DataError(f"{prompt.id}: {answer} does not parse; correct it or leave the row out")


def _check_countdown_gold(prompt: Prompt) -> None:
    numbers, target = prompt.checker.get("numbers"), prompt.checker.get("target")
    if not numbers or not all(isinstance(n, int) and n >= 0 for n in numbers) or not isinstance(target, int):
        raise DataError(f"{prompt.id}: checker needs numbers (a list of integers) and target (an integer)")


def _expression_key(prompt: Prompt, summary: str) -> str:
    """One spelling for expressions that differ in spaces and idle parentheses."""
    answer = last_stated(summary)
    tree = _parse_expression(answer) if answer else None
    return unparsed(tree, answer or "") if tree else re.sub(r"\s+", "", answer or "").lower()


def _stated_key(prompt: Prompt, summary: str) -> str:
    return re.sub(r"\s+", "", last_stated(summary) or "").lower()


@dataclass(frozen=True)
class Checker:
    """A task's check of an answer, its check of the gold answer, and the key by which summaries vote."""

    check: Callable[[Prompt, str], Score]
    check_gold: Callable[[Prompt], None]
    votes: Callable[[Prompt, Sequence[str]], list[str]]  # "" where a summary gives no answer


def _label_key(prompt: Prompt, summary: str) -> str:
    labels = prompt.checker["labels"]
    place = read_verdict(summary, {label: float(number) for number, label in enumerate(labels)})
    return "" if place is None else labels[int(place)]


def _one_by_one(key: Callable[[Prompt, str], str]) -> Callable[[Prompt, Sequence[str]], list[str]]:
    return lambda prompt, summaries: [key(prompt, summary) for summary in summaries]


ANSWER = Checker(
    check_answer, _check_answer_gold, lambda prompt, summaries: answers.votes(gold_of(prompt), summaries)
)
CHECKERS: dict[str, Checker] = {
    "word": ANSWER,
    "countdown": Checker(check_countdown, _check_countdown_gold, _one_by_one(_expression_key)),
    "program": Checker(
        check_program,
        check_program_gold,
        lambda prompt, summaries: [vote_of_program(prompt.checker, summary) for summary in summaries],
    ),
    drop.TASK: Checker(drop.check_drop, drop.check_drop_gold, _one_by_one(drop.vote_of_drop)),
    "judging": Checker(check_label, lambda prompt: None, _one_by_one(_label_key)),
    "reasoning_gym": Checker(check_gym, lambda prompt: None, _one_by_one(_stated_key)),
}  # every other task states its answer as text: gsm8k, svamp, math500 ...


def checker_of(prompt: Prompt) -> Checker:
    if "reasoning_gym" in prompt.checker:
        return CHECKERS["reasoning_gym"]
    return CHECKERS["program"] if "tests" in prompt.checker else CHECKERS.get(prompt.task, ANSWER)


def is_verifiable(prompt: Prompt) -> bool:
    """Whether a rule can score answers to the prompt."""
    return prompt.task not in (*GENERAL_TASKS, CURATED)


def check_gold(prompt: Prompt) -> None:
    """Raises DataError, naming the prompt, where no answer could ever match its gold answer."""
    if is_verifiable(prompt):
        checker_of(prompt).check_gold(prompt)


def votes(prompt: Prompt, texts: Sequence[str]) -> list[str]:
    """Votes of a prompt's completions in cons@k: equal answers by one spelling, "" for no answer."""
    return checker_of(prompt).votes(prompt, [summary_of(text) for text in texts])


def states_answer(prompt: Prompt, summary: str) -> bool:
    """Whether a summary gives a final answer; one of any form where the gold answer is not known."""
    checker = checker_of(prompt)
    if checker is ANSWER and not prompt.answer:
        return last_stated(summary) is not None
    return any(checker.votes(prompt, [summary]))


def summary_of(text: str) -> str:
    """The text after the reasoning, which may state the answer; all of a text without think tags."""
    return parse(text).summary.split(THINK)[0]  # reasoning that never ends has no summary


def accuracy(prompt: Prompt, completion: Completion) -> Score:
    """1 or 0 by the task's checker. Raises ValueError on a general prompt: there no rule applies."""
    if not is_verifiable(prompt):
        raise ValueError(f"accuracy has no rule for task {prompt.task}")
    verdict = checker_of(prompt).check(prompt, summary_of(completion.text))
    heartbeat.tick()
    return verdict


def is_correct(prompt: Prompt, text: str) -> bool:
    """Whether a response states the right final answer; False where no verdict was reached."""
    score = checker_of(prompt).check(prompt, summary_of(text))
    return score.status is Status.SCORED and score.value == 1.0
