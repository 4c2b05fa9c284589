"""Small programs checked by running tests: arithmetic in steps, or a list filtered, mapped and reduced.

Sample (level 1, en): "Write a function f(x): add 3, then multiply by 2."
careful: "First `x+3`\\nThen `(x+3)*2`" ->
summary with a fenced `def f(x): return (x+3)*2`. A hasty solver forgets the parentheses.
"""

import random
from collections.abc import Callable
from operator import add, floordiv, mod, mul, sub

from r1pipe.core.types import Prompt
from r1pipe.data.world.content import index, make_prompt

STEPS = {1: (2, 2), 2: (3, 3), 3: (4, 4), 4: (5, 6)}  # steps by level
TESTS = 5

_PHRASES = {
    "+": ("add {}", "加{}"),
    "-": ("subtract {}", "减{}"),
    "*": ("multiply by {}", "乘{}"),
    "//": ("divide by {} rounding down", "整除{}"),
    "%": ("take the remainder by {}", "除以{}取余数"),
    ">": ("keep the numbers above {}", "保留大于{}的数"),
    "<": ("keep the numbers below {}", "保留小于{}的数"),
    "sum": ("add them up", "求和"),
    "max": ("take the largest", "取最大"),
    "len": ("count them", "数个数"),
}
_APPLY = {"+": add, "-": sub, "*": mul, "//": floordiv, "%": mod}
_RANGES = {"+": (1, 20), "-": (1, 20), "*": (2, 9), "//": (2, 9), "%": (2, 9)}  # of a step's number
_REDUCERS: dict[str, Callable[[list[int]], int]] = {"sum": sum, "max": max, "len": len}


def make(rng: random.Random, language: str, level: int) -> Prompt:
    """A random specification with tests; the key is the list of steps."""
    steps: list[list] = []
    if level <= 2 and rng.random() < 0.35:
        variable = "xs"
        steps.append([rng.choice("><"), rng.randint(1, 9)])
        if rng.random() < 0.6:
            steps.append([rng.choice("+-*"), rng.randint(2, 9)])
        steps.append([rng.choice(["sum", "len", "sum", "max"]), 0])
    else:
        variable, count = "x", rng.randint(*STEPS[level])
        while len(steps) < count:
            operator = rng.choice(list(_RANGES))
            if not steps or steps[-1][0] != operator:
                steps.append([operator, rng.randint(*_RANGES[operator])])
    at = index(language)
    phrases = [_PHRASES[operator][at].format(number) for operator, number in steps]
    question = (
        f"Write a function f({variable}): {', then '.join(phrases)}.",
        f"写函数f({variable})：{'，再'.join(phrases)}。",
    )[at]
    tests: list[list] = []
    for _ in range(TESTS):
        if variable == "xs":  # with a number on each side of any filter, so that `max` is defined
            numbers = [0, 10, *(rng.randint(0, 12) for _ in range(4))]
            tests.append([[numbers], _run_on_list(steps, numbers)])
        else:
            argument = value = rng.randint(-5, 30)
            for operator, number in steps:
                value = _APPLY[operator](value, number)
            tests.append([[argument], value])
    checker = {"entry_point": "f", "tests": tests, "steps": steps, "key": f"program|{steps}"}
    return make_prompt("program", language, question, "", checker, level)


def _run_on_list(steps: list[list], values: list[int]) -> int:
    """The specification's own meaning, step by step."""
    for operator, number in steps[:-1]:
        if operator in _APPLY:
            values = [_APPLY[operator](value, number) for value in values]
        else:
            values = [value for value in values if (value > number if operator == ">" else value < number)]
    return _REDUCERS[steps[-1][0]](values)


def expressions(steps: list[list], parentheses: bool = True) -> list[str]:
    """The expression after each step."""
    if steps[-1][0] in _REDUCERS:
        (comparison, bound), *maps, (reducer, _) = steps
        listed = [f"[x for x in xs if x{comparison}{bound}]"]
        for operator, number in maps:
            listed.append(f"[x{operator}{number} for x in xs if x{comparison}{bound}]")
        return [*listed, f"{reducer}({listed[-1]})"]
    text, additive, out = "x", False, []
    for operator, number in steps:
        if additive and operator in ("*", "//", "%") and parentheses:
            text = f"({text})"
        text, additive = f"{text}{operator}{number}", operator in "+-"
        out.append(text)
    return out


def solve(prompt: Prompt, strategy: str, rng: random.Random, slip: float) -> tuple[str, str]:
    """(reasoning, summary): careful and thorough go step by step, others forget a step or parentheses."""
    at, steps = index(prompt.language), prompt.checker["steps"]
    variable = "xs" if steps[-1][0] in _REDUCERS else "x"
    if strategy in ("careful", "thorough"):
        written = [
            [op, n + rng.choice([-1, 1])] if rng.random() < slip and n > 2 else [op, n] for op, n in steps
        ]
        forms = expressions(written)
        leads = [("First ", "先"), *[("Then ", "再")] * len(forms)]
        lines = [f"{lead[at]}`{form}`" for lead, form in zip(leads, forms, strict=False)]
        reasoning, form = "\n".join(lines), forms[-1]
    else:
        forgotten = rng.randrange(len(steps)) if strategy == "guess" and variable == "x" else None
        hasty = [step for i, step in enumerate(steps) if i != forgotten]
        form = expressions(hasty, parentheses=rng.random() < 0.3)[-1]
        reasoning = (f"I write `{form}` at once.", f"直接写`{form}`。")[at]
    return reasoning, f"```python\ndef f({variable}): return {form}\n```"


def is_right(prompt: Prompt, written: str) -> bool:
    """Whether a summary that `solve` wrote is correct: the very expression that the steps give."""
    return f"return {expressions(prompt.checker['steps'])[-1]}\n" in written
