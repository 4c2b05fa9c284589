"""`r1pipe prune`: remove run folders that nobody needs, and nothing that another run was made from."""

import shutil
import time
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

    names: list[str]  # run ids and stages; none: any
    pipeline: str | None
    unfinished: bool
    older_than_days: float | None  # since anything in the run folder was last written
    keep_last: int | None  # newest runs of each pipeline, stage and seed that stay


def prune(root: Path, selection: Selection, remove: bool) -> list[str]:
    """A line for each selected run, oldest first, and one for all; with `remove` they are removed.

    A run stays while it is running, or while a run that stays names it, as weights, data or otherwise. Raises
    ConfigError for an empty selection, CheckpointError for an unknown name, EnvironmentProblem where a folder
    cannot be removed.
    """
    runs = lineage.run_folders(root)
    selected = sorted(
        ((*_size_and_time(run), run) for run in chosen(runs, selection)), key=lambda one: one[1]
    )
    kept = reasons_to_stay(runs, [run for _, _, run in selected])
    going = {run: size for size, _, run in selected if run not in kept}
    for run in going if remove else ():
        discard(run)
    width = max((len(run.run_id) for _, _, run in selected), default=0)
    shown = []
    for size, written, run in selected:
        what = "kept" if run in kept else "removed" if remove else "remove"
        day = datetime.fromtimestamp(written, UTC).strftime("%Y-%m-%d")
        why = f"  {kept[run]}" if run in kept else ""
        shown.append(f"{what:<7}  {run.run_id:<{width}}  {megabytes(size):>10}  {day}{why}")
    total = f"{len(going)} of {len(selected)} runs, {megabytes(sum(going.values()))}"
    if remove:
        return [*shown, f"removed {total}"]
    return [*shown, f"would remove {total}; --yes removes them" if going else "nothing to remove"]


def chosen(runs: list[RunFolder], selection: Selection) -> list[RunFolder]:
    """The runs for which everything in the selection holds."""
    known = {run: key_of(read_json(run.config)) for run in runs}  # (pipeline, seed, stage)
    names = [*STAGE_TYPES, *(run.run_id for run in runs)]
    for name in selection.names:
        if name not in names:
            raise CheckpointError(f"no run {name}; {nearest(name, names)}")
    if selection == Selection([], None, False, None, None):
        raise ConfigError(
            "which runs? give run ids, stages, pipeline=NAME, --unfinished, --older-than DAYS or "
            "--keep-last N"
        )
    found = runs
    if selection.names:
        found = [run for run in found if {run.run_id, known[run][2]} & {*selection.names}]
    if selection.pipeline is not None:
        found = [run for run in found if known[run][0] == selection.pipeline]
    if selection.unfinished:
        found = [run for run in found if not run.record.exists()]
    if selection.older_than_days is not None:
        before = time.time() - selection.older_than_days * DAY_S
        found = [run for run in found if _size_and_time(run)[1] < before]
    if selection.keep_last is not None:
        alike: dict[tuple, list[RunFolder]] = {}
        for run in sorted(runs, key=lambda run: run.run_id, reverse=True):  # run ids sort by time
            alike.setdefault(known[run], []).append(run)
        newest = {run for group in alike.values() for run in group[: selection.keep_last]}
        found = [run for run in found if run not in newest]
    return found


def reasons_to_stay(runs: list[RunFolder], selected: list[RunFolder]) -> dict[RunFolder, str]:
    """Why some of those selected must stay: they run, or one that stays names them."""
    kept = {}
    for run in selected:
        try:
            check_not_running(run)
        except EnvironmentProblem as error:
            kept[run] = str(error).partition(";")[0].removeprefix(f"run {run.run_id} ")
    texts = {run: _text(run) for run in runs}
    while True:
        going = [run for run in selected if run not in kept]
        staying = [run for run in runs if run not in going]
        needed = {}
        for run in going:
            marks = (f'"{run.run_id}"', f"{run.run_id}/")
            users = [other for other in staying if any(mark in texts[other] for mark in marks)]
            if users:
                more = f" and {len(users) - 1} more" if len(users) > 1 else ""
                needed[run] = f"{users[0].run_id}{more} was made from it"
        if not needed:
            return kept
        kept |= needed


def _text(run: RunFolder) -> str:
    """Where a run names others. Text, not JSON: a file that is damaged still holds the names."""
    files = (run.config, run.record)
    return "".join(path.read_text(encoding="utf-8", errors="replace") for path in files if path.exists())


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


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"
