"""Small programs checked by running tests: arithmetic in steps, or a list filtered, mapped and reduced.

Sample (level 1, en): "Write a function f(x): add 3, then multiply by 2."
careful: "First `x+3`\\nThen `(x+3)*2`" ->
summary with a fenced `def f(x): return (x+3)*2`. A hasty solver forgets the parentheses.
"""

import random
from collections.abc import Callable
from operator import add, floordiv, mod, mul, sub

from r1pipe.core.types import Prompt
from r1pipe.data.world.content import index, prompt_id

STEPS = {1: (2, 2), 2: (3, 3), 3: (4, 4), 4: (5, 6)}  # steps by level
TESTS = 5

_NUMBER_STEPS = {  # operator -> ([English, Chinese], smallest, largest)
    "+": (("add {}", "加{}"), 1, 20),
    "-": (("subtract {}", "减{}"), 1, 20),
    "*": (("multiply by {}", "乘{}"), 2, 9),
    "//": (("divide by {} rounding down", "整除{}"), 2, 9),
    "%": (("take the remainder by {}", "除以{}取余数"), 2, 9),
}
_APPLY = {"+": add, "-": sub, "*": mul, "//": floordiv, "%": mod}
_FILTERS = {
    ">": ("keep the numbers above {}", "保留大于{}的数"),
    "<": ("keep the numbers below {}", "保留小于{}的数"),
}
_MAPS = {op: _NUMBER_STEPS[op][0] for op in ("+", "-", "*")}
_REDUCERS = {
    "sum": ("add them up", "求和"),
    "max": ("take the largest", "取最大"),
    "len": ("count them", "数个数"),
}


def make(rng: random.Random, language: str, level: int) -> Prompt:
    """A random specification with tests; the key is the list of steps."""
    if level <= 2 and rng.random() < 0.35:
        variable, steps = "xs", _list_steps(rng)
    else:
        variable, steps = "x", _number_steps(rng, rng.randint(*STEPS[level]))
    at = index(language)
    phrases = [_phrase(step, at) for step in steps]
    question = (
        f"Write a function f({variable}): {', then '.join(phrases)}.",
        f"写函数f({variable})：{'，再'.join(phrases)}。",
    )[at]
    tests = _tests(rng, variable, steps)
    checker = {"entry_point": "f", "tests": tests, "steps": steps, "key": f"program|{steps}"}
    return Prompt(prompt_id("program", language, question), "program", language, question, "", checker, level)


def _number_steps(rng: random.Random, count: int) -> list[list]:
    steps: list[list] = []
    while len(steps) < count:
        operator = rng.choice(list(_NUMBER_STEPS))
        if not steps or steps[-1][0] != operator:
            steps.append([operator, rng.randint(*_NUMBER_STEPS[operator][1:])])
    return steps


def _list_steps(rng: random.Random) -> list[list]:
    steps: list[list] = [[rng.choice(list(_FILTERS)), rng.randint(1, 9)]]
    if rng.random() < 0.6:
        steps.append([rng.choice(list(_MAPS)), rng.randint(2, 9)])
    return [*steps, [rng.choice(["sum", "len", "sum", "max"]), 0]]


def _phrase(step: list, at: int) -> str:
    operator, number = step
    if operator in _REDUCERS:
        return _REDUCERS[operator][at]
    texts = _FILTERS[operator] if operator in _FILTERS else _NUMBER_STEPS[operator][0]
    return texts[at].format(number)


def _run(steps: list[list], argument: int | list[int]) -> int:
    """The specification's own meaning, step by step."""
    if isinstance(argument, int):
        value = argument
        for operator, number in steps:
            value = _APPLY[operator](value, number)
        return value
    values = list(argument)
    for operator, number in steps[:-1]:
        if operator in _FILTERS:
            values = [v for v in values if (v > number if operator == ">" else v < number)]
        else:
            values = [_APPLY[operator](v, number) for v in values]
    reducers: dict[str, Callable[[list[int]], int]] = {"sum": sum, "len": len, "max": max}
    return reducers[steps[-1][0]](values)


def _tests(rng: random.Random, variable: str, steps: list[list]) -> list[list]:
    tests = []
    for _ in range(TESTS):
        argument: int | list[int] = rng.randint(-5, 30) if variable == "x" else 0
        if variable == "xs":  # with a number on each side of any filter, so that `max` is defined
            argument = [0, 10, *(rng.randint(0, 12) for _ in range(4))]
        tests.append([[argument], _run(steps, argument)])
    return tests


def expressions(steps: list[list], parentheses: bool = True) -> list[str]:
    """The expression after each step."""
    if any(operator in _REDUCERS for operator, _ in steps):
        return _list_expressions(steps)
    text, additive, out = "x", False, []
    for operator, number in steps:
        if additive and operator in ("*", "//", "%") and parentheses:
            text = f"({text})"
        text, additive = f"{text}{operator}{number}", operator in "+-"
        out.append(text)
    return out


def _list_expressions(steps: list[list]) -> list[str]:
    condition = f"x{steps[0][0]}{steps[0][1]}"
    mapped = f"x{steps[1][0]}{steps[1][1]}" if len(steps) == 3 else "x"
    out = [f"[x for x in xs if {condition}]"]
    if len(steps) == 3:
        out.append(f"[{mapped} for x in xs if {condition}]")
    return [*out, f"{steps[-1][0]}([{mapped} for x in xs if {condition}])"]


def solve(prompt: Prompt, strategy: str, rng: random.Random, slip: float) -> tuple[str, str]:
    """(reasoning, summary): careful writes each step's expression; others forget parentheses or a step."""
    at, steps = index(prompt.language), prompt.checker["steps"]
    variable = "xs" if any(operator in _REDUCERS for operator, _ in steps) else "x"
    if strategy == "careful":
        written = [
            [op, n + rng.choice([-1, 1])] if rng.random() < slip and n > 2 else [op, n] for op, n in steps
        ]
        forms = expressions(written)
        leads = [("First ", "先"), *[("Then ", "再")] * len(forms)]
        lines = [f"{lead[at]}`{form}`" for lead, form in zip(leads, forms, strict=False)]
        return "\n".join(lines), _program(variable, forms[-1])
    forgotten = rng.randrange(len(steps)) if strategy == "guess" and variable == "x" else None
    hasty = [step for i, step in enumerate(steps) if i != forgotten]
    form = expressions(hasty, parentheses=rng.random() < 0.3)[-1]
    return (f"I write `{form}` at once.", f"直接写`{form}`。")[at], _program(variable, form)


def _program(variable: str, form: str) -> str:
    return f"```python\ndef f({variable}): return {form}\n```"


def is_right(prompt: Prompt, written: str) -> bool:
    """Whether a summary that `solve` wrote is correct: the very expression that the steps give."""
    return f"return {expressions(prompt.checker['steps'])[-1]}\n" in written
