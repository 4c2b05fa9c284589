"""`make hosts`: the smoke recipe over hosts that are namespaces of this machine, with and without Slurm.

    make hosts ARGS="--keep"
    make hosts ARGS="--only slurm"

A rank is killed, a host loses its power, a cable is taken out, Slurm preempts: each run resumes, in the end
on one host. A table shows what each command said, and how many seconds after the loss. Exit code 1 if
anything did not hold; 0 with the reason where the machine allows no hosts.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table

from hosts import network, scheduler, slurm_trials, trials
from hosts.trials import Outcome

COLUMNS = 160  # where there is no terminal


def over_hosts(folder: Path) -> Iterator[Outcome]:
    with network.network(folder / "network", "h1", "h2") as hosts:
        yield from trials.run(hosts, folder)


def under_slurm(folder: Path) -> Iterator[Outcome]:
    if reason := scheduler.missing():
        yield Outcome("Slurm", None, f"not tried: {reason}")
        return
    with network.network(folder / "network-of-slurm", "h1", "h2") as hosts:
        yield from slurm_trials.run(hosts, scheduler.Slurm(hosts, folder / "slurm"), folder)


def outcomes(kinds: list[Callable[[Path], Iterator[Outcome]]], folder: Path) -> Iterator[Outcome]:
    """Of all kinds, one after the other; a row that says so where one broke off."""
    for kind in kinds:
        try:
            yield from kind(folder)
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            yield Outcome(kind.__name__, False, f"{type(error).__name__}: {' '.join(str(error).split())}")


def table(rows: list[Outcome]) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="bold")
    shown.add_column("trial")
    shown.add_column("held")
    for name in ("line", "ranks' end", "command"):
        shown.add_column(f"{name} (s)", justify="right")
    shown.add_column("told", overflow="fold")
    for row in rows:
        seconds = [f"{value:.1f}" if value is not None else "" for value in row.seconds]
        held = {True: "yes", False: "no", None: "-"}[row.held]
        shown.add_row(row.trial, held, *seconds, row.told, style="bold red" if row.held is False else None)
    return shown


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser("make hosts ARGS=", description="Jobs over hosts of one machine.")
    parser.add_argument("--only", choices=["hosts", "slurm"])
    parser.add_argument("--keep", action="store_true", help="keep the runs, and say where")
    arguments = parser.parse_args(words)
    if reason := network.missing():
        print(f"hosts: not tried: {reason}")
        return 0
    kinds = [over_hosts] * (arguments.only != "slurm") + [under_slurm] * (arguments.only != "hosts")
    folder, rows = Path(tempfile.mkdtemp(prefix="r1pipe-hosts-")), []
    for outcome in outcomes(kinds, folder):
        rows.append(outcome)
        print(f"{outcome.trial}: {outcome.told}", file=sys.stderr, flush=True)
    out = Console()
    Console(width=None if out.is_terminal else COLUMNS, highlight=False).print(table(rows))
    failed = any(row.held is False for row in rows)
    if failed or arguments.keep:
        print(f"the runs are in {folder}")
    else:
        shutil.rmtree(folder)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
