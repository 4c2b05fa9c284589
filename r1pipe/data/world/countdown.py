"""Countdown: make a target from given numbers with + and -, each number used once, by search.

Sample (level 2, en): "Use 9, 25, 3 and 14 to make 17."
thorough: "Sort 25 14 9 3.\\n25+14=39+9=48+3=51?17 no\\n…\\n25-14=11+9=20-3=17?17 yes"
-> "The answer is 25-14+9-3."
Every try restates the target: that is what lets a small model tell success from failure.
"""

import itertools
import random

from r1pipe.core.types import Prompt
from r1pipe.data.world.content import index, make_prompt, split_of
from r1pipe.data.world.word import summary

SHAPES = {1: (3, 30), 2: (4, 30), 3: (4, 60), 4: (5, 60)}  # level -> (how many numbers, the largest)


def patterns(count: int) -> list[tuple[int, ...]]:
    """Signs of all numbers but the first (largest), in the order of a thorough search: all plus first."""
    return list(itertools.product((1, -1), repeat=count - 1))


def value(numbers: list[int], signs: tuple[int, ...]) -> int:
    return numbers[0] + sum(n * s for n, s in zip(numbers[1:], signs, strict=True))


def expression(numbers: list[int], signs: tuple[int, ...]) -> str:
    terms = [f"{'+' if s > 0 else '-'}{n}" for n, s in zip(numbers[1:], signs, strict=True)]
    return str(numbers[0]) + "".join(terms)


def make(rng: random.Random, language: str, level: int) -> Prompt:
    """A solvable problem; the key is the sorted numbers with the target, whatever order they are shown in."""
    count, largest = SHAPES[level]
    while True:
        numbers = sorted((rng.randint(1, largest) for _ in range(count)), reverse=True)
        target = value(numbers, rng.choice(patterns(count)))
        if target > 0:
            break
    shown = rng.sample(numbers, count)
    question = (
        f"Use {', '.join(map(str, shown[:-1]))} and {shown[-1]} to make {target}.",
        f"用{'、'.join(map(str, shown))}算出{target}。",
    )[index(language)]
    checker = {"numbers": shown, "target": target, "key": key_of(numbers, target)}
    return make_prompt("countdown", language, question, "", checker, level)


def key_of(numbers: list[int], target: int) -> str:
    """What decides the split of a problem; numbers from the largest."""
    return f"countdown|{numbers}|{target}"


def solve(prompt: Prompt, strategy: str, rng: random.Random, slip: float) -> tuple[str, str]:
    """(reasoning, summary): thorough tries in order until one is right, careful works out one try and gives
    up where it misses, terse tries once without steps, guess tries nothing."""
    at = index(prompt.language)
    numbers = sorted(prompt.checker["numbers"], reverse=True)
    target = prompt.checker["target"]
    order = patterns(len(numbers))
    tries = order if strategy == "thorough" else [rng.choice(order)]
    signs = tries[0]
    if strategy == "guess":
        shown = expression(numbers, signs)
        return (f"I think of {shown}.", f"我想是{shown}。")[at], summary(prompt.language, shown)
    lines, hit = [], False
    if strategy == "terse":
        result = value(numbers, signs)
        if rng.random() < 0.35:
            result += rng.choice([-10, -2, -1, 1, 2, 10])
        hit = result == target
        lines.append(f"{expression(numbers, signs)}={result}?{target} {verdict(hit, at)}")
    else:
        lines.append(("Sort ", "排序")[at] + " ".join(map(str, numbers)) + (".", "。")[at])
        for signs in tries:
            shown, result = work_out(numbers, signs, rng, slip)
            hit = result == target
            lines.append(f"{shown}?{target} {verdict(hit, at)}")
            if hit:
                break
    if not hit:
        lines.append(("I give up.", "我放弃。")[at])
    return "\n".join(lines), summary(prompt.language, expression(numbers, signs))


def work_out(numbers: list[int], signs: tuple[int, ...], rng: random.Random, slip: float) -> tuple[str, int]:
    """A try step by step ("25-14=11+9=20") and its result; slips carry over."""
    result = numbers[0]
    shown = str(result)
    for n, s in zip(numbers[1:], signs, strict=True):
        result += n * s
        if rng.random() < slip:
            result += rng.choice([-10, -1, 1, 10])
        shown += f"{'+' if s > 0 else '-'}{n}={result}"
    return shown, result


def verdict(hit: bool, at: int) -> str:
    """In the language with this index."""
    return (("no", "yes"), ("错", "对"))[at][hit]


def drill(rng: random.Random, at: int) -> str:
    """One try with its verdict, right in two of five; never at a held-out problem."""
    while True:
        numbers = sorted((rng.randint(1, 60) for _ in range(rng.randint(3, 5))), reverse=True)
        shown, result = work_out(numbers, rng.choice(patterns(len(numbers))), rng, 0.0)
        target = result if rng.random() < 0.4 else result + rng.choice([-10, -6, -4, -2, 2, 4, 6, 10])
        if target > 0 and split_of(key_of(numbers, target)) == "train":
            return f"{shown}?{target} {verdict(result == target, at)}"


def is_right(prompt: Prompt, written: str) -> bool:
    numbers = sorted(prompt.checker["numbers"], reverse=True)
    right = (signs for signs in patterns(len(numbers)) if value(numbers, signs) == prompt.checker["target"])
    return any(written == summary(prompt.language, expression(numbers, signs)) for signs in right)
