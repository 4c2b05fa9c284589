"""`r1pipe prune`: remove run folders that nobody needs, and nothing that another run was made from."""

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from r1pipe.config import STAGE_TYPES
from r1pipe.core.errors import CheckpointError, ConfigError, EnvironmentProblem, nearest
from r1pipe.core.paths import RunFolder
from r1pipe.launch.run_plan import key_of
from r1pipe.runs import lineage
from r1pipe.runs.files import read_json
from r1pipe.runs.locks import Lock, check_not_running

DAY_S = 86400.0
TRASH = ".pruned"  # under the root: a kill leaves no half-removed run


@dataclass(frozen=True)
class Selection:
    """Which runs to remove: those for which all that is given holds."""

    names: Sequence[str]  # run ids and stages; none: any
    pipeline: str | None
    unfinished: bool
    older_than_days: float | None  # since anything in the run folder was last written
    keep_last: int | None  # newest runs of each pipeline, stage and seed that stay


@dataclass(frozen=True)
class Candidate:
    """A selected run; `kept` says why it stays all the same."""

    run: RunFolder
    size: int  # bytes
    written: float  # when anything in it was last written, seconds since 1970
    kept: str = ""


def prune(root: Path, selection: Selection, remove: bool) -> list[Candidate]:
    """The selected runs, oldest first; with `remove` they are removed, but for those with a reason to stay.

    Raises ConfigError for an empty selection, CheckpointError for an unknown name, EnvironmentProblem where a
    folder cannot be removed.
    """
    found = candidates(root, selection)
    if remove:
        for candidate in found:
            if not candidate.kept:
                discard(candidate.run)
    return found


def candidates(root: Path, selection: Selection) -> list[Candidate]:
    """A run stays while it is running, or while a run that stays names it, as weights, data or otherwise."""
    runs = lineage.run_folders(root)
    wanted = chosen(runs, selection)
    texts = {run.run_id: _texts(run) for run in runs}
    kept = {run.run_id: reason for run in wanted if (reason := _busy(run))}
    removable = [run for run in wanted if run.run_id not in kept]
    while needed := _needed(removable, [run for run in runs if run not in removable], texts):
        kept |= needed
        removable = [run for run in removable if run.run_id not in needed]
    found = [Candidate(run, *_size_and_time(run), kept.get(run.run_id, "")) for run in wanted]
    return sorted(found, key=lambda candidate: candidate.written)


def chosen(runs: list[RunFolder], selection: Selection) -> list[RunFolder]:
    """The runs for which everything in the selection holds."""
    known = {run: key_of(read_json(run.config)) for run in runs}  # (pipeline, seed, stage)
    for name in selection.names:
        if name not in STAGE_TYPES and name not in (run.run_id for run in runs):
            raise CheckpointError(
                f"no run {name}; {nearest(name, [*STAGE_TYPES, *(run.run_id for run in runs)])}"
            )
    holds: list[Callable[[RunFolder], bool]] = []
    if selection.names:
        holds.append(lambda run: bool({run.run_id, known[run][2]} & {*selection.names}))
    if selection.pipeline is not None:
        holds.append(lambda run: known[run][0] == selection.pipeline)
    if selection.unfinished:
        holds.append(lambda run: not run.record.exists())
    if selection.older_than_days is not None:
        before = time.time() - selection.older_than_days * DAY_S
        holds.append(lambda run: _size_and_time(run)[1] < before)
    if selection.keep_last is not None:
        newest = _newest(known, selection.keep_last)
        holds.append(lambda run: run not in newest)
    if not holds:
        raise ConfigError(
            "which runs? give run ids, stages, pipeline=NAME, --unfinished, --older-than DAYS or "
            "--keep-last N"
        )
    return [run for run in runs if all(hold(run) for hold in holds)]


def _newest(known: dict[RunFolder, tuple], count: int) -> set[RunFolder]:
    """The newest runs of each pipeline, seed and stage; run ids sort by time."""
    groups: dict[tuple, list[RunFolder]] = {}
    for run in sorted(known, key=lambda run: run.run_id, reverse=True):
        groups.setdefault(known[run], []).append(run)
    return {run for group in groups.values() for run in group[:count]}


def _texts(run: RunFolder) -> str:
    """Where a run names others. Text, not JSON: a file that is damaged still holds the names."""
    files = (run.config, run.record)
    return "".join(path.read_text(encoding="utf-8", errors="replace") for path in files if path.exists())


def _needed(removable: list[RunFolder], kept_runs: list[RunFolder], texts: dict[str, str]) -> dict[str, str]:
    """Run id -> why it must stay, of the runs that one of those that stay names."""
    found = {}
    for run in removable:
        marks = (f'"{run.run_id}"', f"{run.run_id}/")
        users = [other for other in kept_runs if any(mark in texts[other.run_id] for mark in marks)]
        if users:
            more = f" and {len(users) - 1} more" if len(users) > 1 else ""
            found[run.run_id] = f"{users[0].run_id}{more} was made from it"
    return found


def _busy(run: RunFolder) -> str:
    try:
        check_not_running(run)
    except EnvironmentProblem as error:
        return str(error).partition(";")[0].removeprefix(f"run {run.run_id} ")
    return ""


def _size_and_time(run: RunFolder) -> tuple[int, float]:
    """Bytes on disk, and when anything was last written, not counting what a look at the lock leaves."""
    stats = [path.lstat() for path in run.path.rglob("*") if path != run.guard]
    return sum(stat.st_blocks * 512 for stat in stats), max(stat.st_mtime for stat in stats)


def discard(run: RunFolder) -> None:
    """Remove a run folder, so that a kill leaves no half of it. Raises EnvironmentProblem."""
    Lock(run).take()  # nobody starts it from here on
    trash = run.path.parent / TRASH
    try:
        trash.mkdir(exist_ok=True)
        run.path.rename(trash / run.run_id)
        shutil.rmtree(trash)
    except OSError as error:
        raise EnvironmentProblem(f"{error.filename} cannot be removed ({error.strerror})") from None


def lines(found: list[Candidate], removed: bool) -> list[str]:
    """A line per run, and the total."""
    removable = [candidate for candidate in found if not candidate.kept]
    word = "removed" if removed else "remove"
    width = max((len(candidate.run.run_id) for candidate in found), default=0)
    shown = []
    for candidate in found:
        day = datetime.fromtimestamp(candidate.written, UTC).strftime("%Y-%m-%d")
        what = "kept" if candidate.kept else word
        why = f"  {candidate.kept}" if candidate.kept else ""
        shown.append(
            f"{what:<7}  {candidate.run.run_id:<{width}}  {megabytes(candidate.size):>10}  {day}{why}"
        )
    size = sum(candidate.size for candidate in removable)
    total = f"{len(removable)} of {len(found)} runs, {megabytes(size)}"
    if removed:
        return [*shown, f"removed {total}"]
    return [*shown, f"would remove {total}; --yes removes them" if removable else "nothing to remove"]


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
