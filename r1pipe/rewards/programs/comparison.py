"""What a program gives, compared with what is expected: a call's result, a program's output."""

import math
import re

_PLAIN_TYPES = (bool, int, float, complex, str, bytes, type(None))
_DECIMAL = re.compile(r"[-+]?(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+")
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
TOLERANCE = 1e-6  # of an output's decimals, relative or absolute, as most checkers of contests have it


def same_output(output: str, expected: str) -> bool:
    """Whether two outputs have the same words in the same lines.

    Spaces between words, at the ends of lines and blank lines at the end do not count; case does. Where a
    decimal is expected, any number within TOLERANCE of it is right.
    """
    lines, expected_lines = output.rstrip().split("\n"), expected.rstrip().split("\n")
    return len(lines) == len(expected_lines) and all(map(_same_line, lines, expected_lines))


def _same_line(line: str, expected: str) -> bool:
    words, expected_words = line.split(), expected.split()
    return words == expected_words or (
        len(words) == len(expected_words) and all(map(_same_word, words, expected_words))
    )


def _same_word(word: str, expected: str) -> bool:
    if word == expected:
        return True
    if not _DECIMAL.fullmatch(expected) or not _NUMBER.fullmatch(word):
        return False
    return math.isclose(float(word), float(expected), rel_tol=TOLERANCE, abs_tol=TOLERANCE)


def same_value(result: object, expected: object) -> bool:
    """Python's ==, but floats to 1e-9 and lists like tuples (JSON knows only lists).

    Anything that is not a plain built-in value is never equal.
    """
    if isinstance(expected, list | tuple):
        if not isinstance(result, list | tuple) or len(result) != len(expected):
            return False
        return all(map(same_value, result, expected))
    if isinstance(expected, dict):
        if not isinstance(result, dict) or result.keys() != expected.keys():
            return False
        return all(same_value(result[key], expected[key]) for key in expected)
    if type(result) not in _PLAIN_TYPES:
        return False
    if isinstance(expected, float) and isinstance(result, int | float):
        small = abs(result) < 1e300  # a larger integer does not fit a float
        return result == expected or (small and math.isclose(result, expected, rel_tol=1e-9, abs_tol=1e-12))
    return bool(result == expected)
