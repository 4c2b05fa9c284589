"""docs/pitfalls.md names checks, tripwires, keys, metrics and tests: all of them are there."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from r1pipe.config import to_mapping
from r1pipe.config.compose import compose
from r1pipe.doctor import CHECKS
from r1pipe.train.rl.tripwires import WIRES

HOME = Path(__file__).resolve().parent.parent
TEXT = (HOME / "docs" / "pitfalls.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in TEXT.splitlines()
    if line.startswith("| ") and not line.startswith("| what happens")
]
TESTS = re.findall(r"`(test_\w+\.py)::(\w+)`", TEXT)
NAMED = {
    "doctor": set(CHECKS),
    "tripwire": set(WIRES),
    "tripwires": set(WIRES),
}


@cache
def functions(file: str) -> set[str]:
    tree = ast.parse((HOME / "tests" / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def named(kind: str, cell: str) -> list[str]:
    """The names in backticks that follow a word in a cell, up to the next semicolon."""
    parts = [part.strip() for part in cell.split(";")]
    return [name for part in parts if part.startswith(f"{kind} `") for name in re.findall(r"`([^`]+)`", part)]


def test_every_row_has_a_check_and_a_test() -> None:
    assert len(ROWS) >= 19 and all(len(row) == 3 for row in ROWS)
    for what, at_run_time, held in ROWS:
        assert at_run_time and re.search(r"`test_\w+\.py::\w+`", held), what


@pytest.mark.parametrize(("file", "name"), sorted(set(TESTS)))
def test_the_tests_are_there(file: str, name: str) -> None:
    assert name in functions(file)


@pytest.mark.parametrize("kind", NAMED)
def test_the_checks_are_there(kind: str) -> None:
    found = [name for row in ROWS for name in named(kind, row[1])]
    assert found and set(found) <= NAMED[kind]


def test_every_tripwire_and_every_check_of_the_policy_stands_there() -> None:
    known = {name for row in ROWS for kind in NAMED for name in named(kind, row[1])}
    assert set(WIRES) - known == {"slow_step"}  # the machine's fault, not the run's
    assert set(CHECKS) - known == {"device", "data", "lengths", "disk"}  # of the config and the machine


def test_the_keys_and_metrics_are_there() -> None:
    cells = [row[1] for row in ROWS]
    stage = to_mapping(compose(["stage=all_scenario"]).config)
    for key in [name for cell in cells for name in re.findall(r"`(stage\.[\w.]+)`", cell)]:
        value = stage
        for part in key.split("."):
            assert part in value, key
            value = value[part]
    source = "".join(path.read_text(encoding="utf-8") for path in (HOME / "r1pipe").rglob("*.py"))
    for metric in [name for cell in cells for name in re.findall(r"`(\w+/\w+)`", cell)]:
        assert f'"{metric}"' in source, metric
