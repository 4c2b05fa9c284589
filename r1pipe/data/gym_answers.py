"""Which answers reasoning-gym's own scorers may be given: several of them hand the text to `eval` or sympy.

Sample: countdown's scorer evaluates "(4 + 3) * 2", and would evaluate "__import__('os').system('...')" too.
Such a task is used only where its answers have a grammar here, in which nothing can be named or called.
"""

import ast
import functools
import inspect
import re
import textwrap
from types import FunctionType, ModuleType
from typing import Any

from r1pipe.core.errors import ConfigError

_LONGEST = 1000  # characters; right answers are shorter
_ARITHMETIC = re.compile(r"(?!.*(?:\*\s*\*|/\s*/))[\d+*/() -]+")  # no powers: 9**9**9 takes all there is
GRAMMARS = {  # what an answer may be written with, for tasks whose scorer evaluates answers
    "countdown": _ARITHMETIC,
    "puzzle24": _ARITHMETIC,
    "binary_matrix": re.compile(r"[\d\s]+"),
    "n_queens": re.compile(r"[Q_\s]+"),
    "spiral_matrix": re.compile(r"[\d\s-]+"),
    "string_insertion": re.compile(r"[A-Z]+"),
}
_EVALUATING = {"eval", "exec", "compile", "__import__"}
_EVALUATING_PACKAGES = {"builtins", "importlib", "os", "pickle", "subprocess", "sympy"}


def admits(task: str, answer: str) -> bool:
    """Whether an answer of a task may be given to the task's own scorer."""
    grammar = GRAMMARS.get(task)
    return grammar is None or (len(answer) <= _LONGEST and bool(grammar.fullmatch(answer)))


def check_scorer(task: str, scored: type) -> None:
    """Raises ConfigError where the scorer of a task's class evaluates text and the task has no grammar."""
    if task not in GRAMMARS and evaluates(scored):
        raise ConfigError(
            f"data.tasks: the scorer of {task} evaluates text as Python, so it cannot be used; leave it out. "
            f"Of its like these can be used: {', '.join(GRAMMARS)}"
        )


@functools.cache
def evaluates(scored: type) -> bool:
    """Whether `score_answer` of a class can reach `eval`, its like or sympy through the code of its package.

    A fence for a package that means no harm: names are followed as they are written, and not beyond it.
    """
    package = _package(scored)
    reached: list[tuple[Any, Any]] = [(getattr(scored, "score_answer"), scored)]  # noqa: B009 - of any class
    seen = set()
    while reached:
        function, owner = reached.pop()
        if function in seen:
            continue
        seen.add(function)
        names, attributes, imported = _written(function)
        known = function.__globals__
        objects = [known[name] for name in names if name in known]
        packages = imported | {_package(each) for each in objects}
        if names & _EVALUATING or packages & _EVALUATING_PACKAGES:
            return True
        holders = [each for each in (owner, *objects) if _package(each) == package]
        objects += [getattr(holder, name, None) for holder in holders for name in attributes]
        for each in objects:
            parts = vars(each).values() if isinstance(each, type) else [each]
            functions = (inspect.unwrap(getattr(part, "__func__", part)) for part in parts)
            of = each if isinstance(each, type) else owner
            reached += [(one, of) for one in functions if _package(one) == package and _has_source(one)]
    return False


def _package(thing: Any) -> str:
    name = thing.__name__ if isinstance(thing, ModuleType) else getattr(thing, "__module__", None)
    return str(name).partition(".")[0]


def _has_source(function: Any) -> bool:
    """Not so what `dataclass` generates."""
    return isinstance(function, FunctionType) and not function.__code__.co_filename.startswith("<")


def _written(function: FunctionType) -> tuple[set[str], set[str], set[str]]:
    """The names in a function's source, the attributes, and the packages that it imports itself."""
    names, attributes, imported = set(), set(), set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        match node:
            case ast.Name(id=name):
                names.add(name)
            case ast.Attribute(attr=name):
                attributes.add(name)
            case ast.ImportFrom(module=str(module)):
                imported.add(module.partition(".")[0])
            case ast.Import(names=modules):
                imported |= {module.name.partition(".")[0] for module in modules}
    return names, attributes, imported
