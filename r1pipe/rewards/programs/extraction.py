"""The program in a response: which code block counts, and which of its statements must run.

For a function, the last block that defines it counts, not the last block: usage examples and tests after it
do no harm. For a program that reads standard input, the last block that does so counts. Blocks before it that
define names which it uses and does not define are put before it.
"""

import ast
import bisect
import builtins
import collections
import functools
import heapq
import itertools
import math
import operator
import random
import re
import string
import textwrap
import typing
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from r1pipe.core import python_source
from r1pipe.rewards.programs.tasks import parsed

_FENCE = re.compile(r"^([^`~\n]*)(`{3,}|~{3,})[ \t]*([\w+#.-]*)[^`\n]*$")
_LANGUAGES = {"", "py", "python", "py3", "python3", "python-3", "python3.11", "ipython"}
_START = re.compile(
    r"(?:^|(?<=[\s:：是为]))(?=(?:async )?def |from \w+ import |import \w|class \w+\s*[(:])|^(?=@\w)",
    re.MULTILINE,
)
_READS = re.compile(r"\binput\s*\(|\bstdin\b|\bopen\(0|\bfileinput\b|\bos\.read\(0")
_PRINTS = re.compile(r"\bprint\s*\(|\bstdout\b")
_MAX_PROGRAM = 64 << 10  # characters; these bound the work on a hostile text
_MAX_CUTS = 50  # times that a text is cut back until it is Python
_MAX_STARTS = 8
_MAX_BLOCKS = 50

_IMPORTED = (collections, itertools, functools, heapq, bisect, math, operator, string, re, random, typing)
_EXACT = {"abs", "all", "any", "bool", "int", "len", "list", "max", "min", "print", "range", "sum", "tuple"}

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Definition = _Function | ast.ClassDef | ast.Import | ast.ImportFrom


class Program(NamedTuple):
    """A program whose entry point is called."""

    needed: str  # up to the definition of the entry point
    rest: tuple[str, ...]  # the statements after it, one of which may fail: usage, asserts, helpers
    call: str  # "f", or "Solution().f"


def function_program(context: str, summary: str, entry_point: str) -> Program | None:
    """The program that defines `entry_point`; `context` is the Python text that the response continues."""
    text = _completed(context, summary, entry_point) if context else find_function(summary, entry_point)
    return None if text is None else split(text, entry_point, context)


def find_function(summary: str, entry_point: str) -> str | None:
    """The last block, else the plain text, that defines a function; else the last Python block."""
    summary = summary.replace("\r\n", "\n")
    blocks = _python_blocks(summary)
    for number in reversed(range(len(blocks))):
        if _defining(parsed(blocks[number]), entry_point):
            return _with_helpers(blocks, number)
    plain = _plain(summary)
    if plain and (not blocks or _defining(parsed(plain), entry_point)):
        return plain
    return _with_helpers(blocks, len(blocks) - 1) if blocks else None


def find_script(summary: str) -> str | None:
    """The last block that reads standard input, else the last that prints, else the last; else plain text."""
    summary = summary.replace("\r\n", "\n")
    blocks = _python_blocks(summary)
    for wanted in (_READS, _PRINTS):
        for number in reversed(range(len(blocks))):
            if wanted.search(blocks[number]):
                return _with_helpers(blocks, number)
    return _with_helpers(blocks, len(blocks) - 1) if blocks else _plain(summary)


def split(text: str, entry_point: str, context: str = "") -> Program:
    """A program's statements, those that must run and the others. A `__main__` guard is left out."""
    above = context.count("\n") + 1 if context else 0
    statements = parsed(text)
    own = [node for node in statements if node.lineno > above]
    defining = _defining(own, entry_point) or _defining(statements, entry_point)
    functions = [node for node in defining if entry_point in _bound([node])]
    lines = text.split("\n")
    guards = [node for node in statements if _is_main_guard(node)]
    for node in guards:
        lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or node.lineno) - node.lineno + 1)
    if not defining:
        return Program("\n".join(lines), (), entry_point)
    last = (functions or defining)[-1]
    end = last.end_lineno or last.lineno
    rest = [node for node in statements if node.lineno > end and node not in guards]
    parts = tuple("\n".join(lines[_first_line(node) - 1 : node.end_lineno]) for node in rest)
    needed = "\n".join(lines[:end])
    if functions or not isinstance(last, ast.ClassDef):
        return Program(needed, parts, entry_point)
    return Program(_imports_for(text) + needed, parts, f"{last.name}().{entry_point}")


def is_exact(program: Program) -> bool:
    """Whether a program computes the same in every interpreter: it calls nothing but what surely does."""
    nodes = [node for part in (program.needed, *program.rest) for node in _nodes(part)]
    if any(
        isinstance(node, ast.Set | ast.SetComp | ast.Attribute | ast.Import | ast.ImportFrom)
        for node in nodes
    ):
        return False
    calls = [node.func for node in nodes if isinstance(node, ast.Call)]
    known = _EXACT | {node.name for node in nodes if isinstance(node, _Function)}
    return all(isinstance(call, ast.Name) and call.id in known for call in calls)


def _nodes(text: str) -> list[ast.AST]:
    return [node for statement in parsed(text) for node in ast.walk(statement)]


def _imports_for(text: str) -> str:
    """Imports of what a text uses and does not import, as the sites whose tasks want a class do them."""
    lines = []
    for name in sorted(_missing(text)) if "from __future__" not in text else []:  # which must come first
        if name in (module.__name__ for module in _IMPORTED):
            lines.append(f"import {name}\n")
        having = [module for module in _IMPORTED if name in getattr(module, "__all__", dir(module))]
        lines += [f"from {module.__name__} import {name}\n" for module in having[:1]]
    return "".join(lines)


def _first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", ()))])


def _is_main_guard(node: ast.stmt) -> bool:
    if not isinstance(node, ast.If) or not isinstance(node.test, ast.Compare):
        return False
    sides = [node.test.left, *node.test.comparators]
    return any(isinstance(side, ast.Name) and side.id == "__name__" for side in sides)


def _defining(statements: Iterable[ast.stmt], name: str) -> list[ast.stmt]:
    """The statements that define a name, as a method of a class too."""
    return [
        node
        for node in statements
        if name in _bound([node])
        or (
            isinstance(node, ast.ClassDef)
            and name in _bound(each for each in node.body if isinstance(each, _Function))
        )
    ]


def _bound(statements: Iterable[ast.stmt]) -> set[str]:
    """The names that statements bind in their own scope."""
    names: set[str] = set()
    for node in statements:
        if isinstance(node, _Function | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        else:
            inner = [each for each in ast.walk(node) if each is not node]
            names |= {
                each.id for each in inner if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)
            }
            names |= _bound(each for each in inner if isinstance(each, _Definition))
    return names


def _missing(text: str) -> set[str]:
    """The names that a text uses and binds nowhere."""
    nodes = _nodes(text)
    names = [node for node in nodes if isinstance(node, ast.Name)]
    used = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    bound = {node.id for node in names if not isinstance(node.ctx, ast.Load)}
    bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    bound |= _bound(node for node in nodes if isinstance(node, _Definition))
    return {name for name in used - bound if not hasattr(builtins, name)}


def _with_helpers(blocks: Sequence[str], number: int) -> str:
    """A block after those before it that define what it lacks."""
    text = blocks[number]
    for earlier in reversed(blocks[:number]):
        if len(earlier) + len(text) <= _MAX_PROGRAM and _bound(parsed(earlier)) & _missing(text):
            text = f"{earlier}\n{text}"
    return text


def _blocks(text: str) -> Iterator[str]:
    """The contents of fenced blocks that name Python or no language, the fence's indentation taken off."""
    opened: tuple[str, str, bool] | None = None  # indentation, fence, whether it is Python
    lines: list[str] = []
    for line in text.split("\n"):
        if opened is None:
            if found := _FENCE.match(line):
                indent = found[1] if not found[1].strip() else ""
                opened, lines = (indent, found[2], found[3].lower() in _LANGUAGES), []
            continue
        indent, fence, is_python = opened
        if line.rstrip().endswith(fence):
            lines.append(line.rstrip().rstrip(fence[0]))
            opened = None
            if is_python:
                yield "\n".join(each.removeprefix(indent) for each in lines).rstrip()
        else:
            lines.append(line)


def _python_blocks(text: str) -> list[str]:
    """The blocks that are Python, as they are or without their common indentation."""
    found = []
    for block in _blocks(text):
        if len(block) <= _MAX_PROGRAM:
            fitting = [each.strip("\n") for each in (block, textwrap.dedent(block)) if parsed(each)]
            found += fitting[:1]
    return found[-_MAX_BLOCKS:]


def _plain(text: str) -> str | None:
    """The whole text if it is Python, else the longest Python text from a first def, class or import."""
    whole = parsed(text) if len(text) <= _MAX_PROGRAM else []
    if any(not isinstance(node, ast.Expr) for node in whole) or (whole and _PRINTS.search(text)):
        return text
    for start in itertools.islice(_START.finditer(text[:_MAX_PROGRAM]), _MAX_STARTS):
        if program := _longest_python(text[start.start() :].lstrip()):
            return program
    return None


def _fault_line(text: str) -> int | None:
    """The line (from 1) where a text stops being Python; None where it is Python."""
    try:
        return None if python_source.parse(text).body else 1
    except SyntaxError as error:
        return error.lineno or 1
    except (ValueError, RecursionError, MemoryError):
        return 1


def _longest_python(text: str, kept: str = "") -> str | None:
    """`kept` and as many of the text's first lines as are Python, with or without a trailing full stop."""
    lines = text[:_MAX_PROGRAM].rstrip().splitlines()
    above, end = kept.count("\n"), len(lines)
    for _ in range(_MAX_CUTS):
        if end <= 0 or not "".join(lines[:end]).strip():
            return None
        candidate = kept + "\n".join(lines[:end]).rstrip()
        for program in (candidate, candidate.rstrip("。.")):
            fault = _fault_line(program)
            if fault is None:
                return program
        end = min(end - 1, max((fault or 1) - above - 1, 1))
    return None


def _completed(context: str, summary: str, entry_point: str) -> str | None:
    """The program of a completion of `context`, a function's head and docstring after its imports.

    The completion may write the whole function (in a code block, or as it is) or its body alone.
    """
    summary = summary.replace("\r\n", "\n")
    whole = find_function(summary, entry_point)
    if whole and _defining(parsed(whole), entry_point):
        return f"{context}\n{whole}"
    for body in (*reversed(list(_blocks(summary))), summary):
        # as it is; with the first line's indentation, which stripping takes; without any
        for text in (body, "    " + body.lstrip(" \t"), textwrap.indent(body, "    ")):
            if not text.strip() or not text.lstrip("\n").startswith((" ", "\t")):
                continue
            if program := _longest_python(text, kept=context.rstrip() + "\n"):
                return program
    return None
