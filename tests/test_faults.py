"""`make faults` in its short forms: every kind of fault once, and the runner itself."""

import importlib
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import SkipTest

import pytest
from faults import __main__ as runner
from faults import kills, matrix
from faults.outcome import Outcome
from faults.points import POINTS, Point, at, noted, nth_call

LONG = ("fuzz", "kills", "matrix", "spread", "workers")  # other test files have the like


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in runner.modules()]
)
def test_nothing_is_lost(name: str, tmp_path: Path) -> None:
    rows = [*runner.outcomes(name, tmp_path, runner.parse(["--short", "--only", name]))]
    assert rows, f"{name} yields no row"
    if not any(row.tried for row in rows):
        pytest.skip("; ".join(row.told for row in rows))
    assert [row for row in rows if runner.lost(row)] == []


def test_modules_are_those_that_have_run() -> None:
    assert {"kills", "matrix"} <= set(runner.modules())
    assert not {"outcome", "points", "same", "lab", "forks", "warm"} & set(runner.modules())


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[Outcome]:
    """What the only module of a made-up folder yields."""
    rows: list[Outcome] = []

    def outcomes(name: str, folder: Path, arguments: object) -> Iterator[Outcome]:
        assert folder.is_dir() and not any(folder.iterdir())
        yield from rows

    monkeypatch.setattr(runner, "outcomes", outcomes)
    return rows


def test_the_table_says_what_held_and_the_exit_code_whether_all_did(
    made_up: list[Outcome], capsys: pytest.CaptureFixture
) -> None:
    made_up += [
        Outcome("a full disk", 3, 3, "the last good checkpoint stays"),
        Outcome("no tmpfs", 0, 0, "no root"),
    ]
    assert runner.main(["--only", "matrix"]) == 0
    out, err = capsys.readouterr()
    assert "a full disk" in out and "no root" in out and "the runs are in" not in out
    assert err.splitlines() == ["a full disk: 3 of 3 held", "no tmpfs: no root"], "a line when each is done"
    made_up.append(Outcome("a flipped bit", 2, 1, "the weights are others"))
    assert runner.main(["--only", "matrix"]) == 1
    assert "the runs are in" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["--only", "nothing"], ["--kill", "3"], ["--kill", "3", "--only", "matrix"]]
)
def test_what_cannot_be_asked_for_is_refused(words: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        runner.main(words)
    assert ended.value.code == 2 and "error:" in capsys.readouterr().err


def test_a_module_that_fails_or_has_no_room_here_is_a_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for error, tried, told in (
        (SkipTest("no tmpfs"), 0, "not tried: no tmpfs"),
        (OSError("no"), 1, "OSError: no"),
    ):
        monkeypatch.setattr(matrix, "run", partial(raising, error))
        [row] = runner.outcomes("matrix", tmp_path, runner.parse(["--only", "matrix"]))
        assert (row.tried, row.held, row.told) == (tried, 0, told)


def raising(error: Exception, *_: object) -> Iterator[Outcome]:
    raise error


def test_a_kill_after_its_stages_end_is_told_as_such(tmp_path: Path) -> None:
    """The command is a stage that leaves its record and stays; a point comes, a time comes, or neither."""
    stays = tmp_path / "stays.py"
    root = tmp_path / "root"

    def where(kill: kills.Kill, *, ends: bool, marks: bool = False) -> str | None:
        shutil.rmtree(root, ignore_errors=True)
        (root / "grpo-s0-1").mkdir(parents=True)
        made = [root / "grpo-s0-1" / "record.json"] * ends + [root / "marker"] * marks
        touched = "; ".join(f"pathlib.Path({str(path)!r}).touch()" for path in made)
        stays.write_text(f"import pathlib, time; time.sleep(0.3); {touched or 'pass'}; time.sleep(3600)")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kills, "command_line", lambda *_: [sys.executable, str(stays)])
            patch.setattr(kills, "LATE_S", 0.2)
            return kills.attempt(root, [], kill, {})

    point = kills.Kill(0, "grpo", "in an update")
    assert where(point, ends=False, marks=True) == kills.INSIDE
    assert where(point, ends=True) == kills.AFTER
    landed = {
        point: kills.INSIDE,
        replace(point, number=1): kills.AFTER,
        replace(point, number=2): kills.INSIDE,
    }
    assert kills.told(landed) == "2 inside a stage, 1 after its end"


def test_kills_are_the_same_again_and_differ_by_seed_and_number(tmp_path: Path) -> None:
    calls = {stage: kills.Counter(dict.fromkeys(POINTS, 4)) for stage in ("base", "grpo")}
    reference = kills.Reference(tmp_path, {"base": 9.0, "grpo": 30.0}, calls)
    first = [kills.drawn(3, number, reference) for number in range(60)]
    assert first == [kills.drawn(3, number, reference) for number in range(60)]
    assert first[17] != kills.drawn(4, 17, reference) and len({(k.stage, k.point, k.nth) for k in first}) > 20
    assert any(kill.point is None for kill in first), "some by the clock"
    order = [kill.stage for kill in sorted(first, key=lambda kill: kills.due(kill, reference))]
    assert order == sorted(order), "by stage: a later one's kill would never land before an earlier one's"


def test_every_point_is_a_function_that_is_there() -> None:
    for name, point in POINTS.items():
        module, _, attribute = point.target.partition(":")
        owner: object = importlib.import_module(module)
        for part in attribute.split("."):
            assert hasattr(owner, part), f"{name}: {point.target} is gone; name what does its work now"
            owner = getattr(owner, part)


def test_a_point_stops_at_its_nth_call_and_only_for_its_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Path, "replace", Path.replace)  # put back afterwards
    stopped: list[str] = []
    at(Point("pathlib:Path.replace", file="record.json"), nth_call(2, lambda: stopped.append("here")))
    at(Point("pathlib:Path.replace", after=True), noted("moved", tmp_path / "calls.txt"))
    for _ in range(3):
        for name in ("record.json", "other.json"):
            (tmp_path / "partial").write_text("x")
            before = len(stopped)
            (tmp_path / "partial").replace(tmp_path / name)
            assert len(stopped) == before or name == "record.json"
    assert stopped == ["here"]
    assert (tmp_path / "calls.txt").read_text() == "moved\n" * 6
