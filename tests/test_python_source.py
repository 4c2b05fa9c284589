"""Python source is parsed by one thread at a time: CPython 3.11 crashes where trees grow in several."""

import gc
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from r1pipe.core import python_source

SOURCE = "def f(x): return " + " + ".join(f"(x * {i} - [{i}, {{{i}: x}}][0])" for i in range(60))


class Garbage:
    """A cycle whose end runs Python: where the collector meets it inside a tree, threads take turns."""

    def __init__(self) -> None:
        self.own = self

    def __del__(self) -> None:
        for _ in range(50):
            pass


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns and garbage is collected as often as can be: without the lock 14 of 100 failed."""
    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-6)
    gc.set_threshold(50)
    yield
    sys.setswitchinterval(interval)
    gc.set_threshold(*thresholds)


def test_one_thread_parses_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    inside, seen, parse = [0], [], python_source.ast.parse

    def counted(*text: str, **mode: str) -> object:
        inside[0] += 1
        seen.append(inside[0])
        time.sleep(0.002)
        inside[0] -= 1
        return parse(*text, **mode)

    monkeypatch.setattr(python_source.ast, "parse", counted)
    calls = [python_source.parse, python_source.parse_expression, python_source.literal] * 8
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda call: call("[1]"), calls))
    assert seen == [1] * 24


def test_threads_that_parse_together_get_their_trees(hasty: None) -> None:
    def parse(number: int) -> int:
        for _ in range(10):
            Garbage()
        parsers = (
            python_source.parse,
            lambda text: python_source.parse_expression(text.partition("return ")[2]),
        )
        return len(python_source.ast.dump(parsers[number % 2](SOURCE)))

    with ThreadPoolExecutor(4) as threads:
        sizes = list(threads.map(parse, range(100)))
    assert len(set(sizes[::2])) == len(set(sizes[1::2])) == 1 and sizes[0] > sizes[1] > 1000


@pytest.mark.parametrize("text", ["{[1]: 2}", "f(1)", "1 +", "", "[" * 500])
def test_what_is_no_literal_is_told_by_the_same_few_errors(text: str) -> None:
    with pytest.raises((SyntaxError, ValueError, RecursionError, MemoryError)):
        python_source.literal(text)
    assert python_source.literal(' {"a": [1, -2.5, None]} ') == {"a": [1, -2.5, None]}
