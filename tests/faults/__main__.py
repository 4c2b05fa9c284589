"""`make faults`: makes every kind of fault on purpose, and shows in a table what held.

    make faults ARGS="--seed 3 --only kills,matrix"
    make faults ARGS="--seed 3 --only kills --kill 17"

Exit code 1 if anything was lost. Each module of this folder that has `run` is one kind of fault.
"""

import argparse
import ast
import importlib
import logging
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from unittest import SkipTest

from rich.console import Console
from rich.table import Table

from faults.outcome import Outcome
from r1pipe.core.errors import R1pipeError
from r1pipe.core.formatting import duration

HERE = Path(__file__).parent
COLUMNS = 100  # where there is no terminal


def modules() -> list[str]:
    """The names of those in this folder that have `run`, found without importing the others."""
    return sorted(path.stem for path in HERE.glob("[a-z]*.py") if "run" in functions(path))


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def outcomes(name: str, folder: Path, arguments: argparse.Namespace) -> Iterator[Outcome]:
    """What a module yields; a row that says so where it ended by itself, or has nothing to run in here."""
    module: ModuleType = importlib.import_module(f"faults.{name}")
    try:
        if arguments.kill is not None:
            yield from module.run_one(folder, arguments.seed, arguments.kill)
        else:
            yield from module.run(folder, arguments.seed, arguments.short)
    except SkipTest as reason:
        yield Outcome(name, 0, 0, f"not tried: {reason}")
    except (AssertionError, OSError, R1pipeError) as error:
        yield Outcome(name, 1, 0, f"{type(error).__name__}: {' '.join(str(error).split())}")


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "make faults ARGS=", description="Make faults on purpose, see what holds."
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn: the same faults again")
    parser.add_argument("--only", default="", help=f"some of {','.join(modules())}")
    parser.add_argument("--kill", type=int, help="with --only kills: this kill alone")
    parser.add_argument("--short", action="store_true", help="the form that `make test` has")
    parser.add_argument("--keep", action="store_true", help="keep the runs, and say where")
    arguments = parser.parse_args(words)
    arguments.only = [name for name in arguments.only.split(",") if name] or modules()
    unknown = sorted(set(arguments.only) - set(modules()))
    if unknown:
        parser.error(f"no faults named {', '.join(unknown)}; known: {', '.join(modules())}")
    if arguments.kill is not None and arguments.only != ["kills"]:
        parser.error("--kill=N goes with --only kills")
    return arguments


def table(rows: list[tuple[Outcome, float]]) -> Table:
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("fault", "tried", "held", "time", "told"):
        shown.add_column(name, justify="right" if name in ("tried", "held", "time") else "left")
    for outcome, seconds in rows:
        style = "bold red" if lost(outcome) else None if outcome.tried else "dim"
        counts = (str(outcome.tried), str(outcome.held)) if outcome.tried else ("-", "-")
        shown.add_row(outcome.fault, *counts, duration(seconds), outcome.told, style=style)
    return shown


def lost(outcome: Outcome) -> bool:
    return outcome.held < outcome.tried


class Saying(logging.Handler):
    """Shows the newest line of what a module says it is at, beside a spinner."""

    def __init__(self, console: Console):
        super().__init__()
        self.status, self.module, self.began = console.status(""), "", time.monotonic()

    def emit(self, record: logging.LogRecord) -> None:
        self.status.update(
            f"{self.module} ({duration(time.monotonic() - self.began)}): {record.getMessage()}"
        )


@contextmanager
def quietly(path: Path) -> Iterator[None]:
    """What jobs of this process say goes into a file, and not between the lines of results."""
    with path.open("a") as file, redirect_stdout(file), redirect_stderr(file):
        logging.basicConfig(stream=file)
        yield


def tried(
    root: Path, arguments: argparse.Namespace, say: Saying, console: Console
) -> Iterator[tuple[Outcome, float]]:
    """Each outcome and its seconds, told when it is there."""
    for name in arguments.only:
        say.module, began = name, time.monotonic()
        (root / name).mkdir()
        for outcome in outcomes(name, root / name, arguments):
            shown = replace(outcome, told=outcome.told.replace(f"{root}/", ""))
            held = f"{shown.held} of {shown.tried} held" if shown.tried else shown.told
            console.print(f"{shown.fault}: {held}", highlight=False, soft_wrap=True)
            yield shown, time.monotonic() - began
            began = time.monotonic()


def main(words: list[str]) -> int:
    """Run the modules one after the other; the exit code."""
    arguments, console = parse(words), Console(file=sys.stderr)
    say = Saying(console)
    logging.getLogger("faults").setLevel(logging.INFO)
    logging.getLogger("faults").propagate = False
    if console.is_terminal:
        logging.getLogger("faults").addHandler(say)
        say.status.start()
    root = Path(tempfile.mkdtemp(prefix="r1pipe-faults-"))
    with quietly(root / "log.txt"):
        rows = list(tried(root, arguments, say, console))
    say.status.stop()
    out = Console()
    Console(width=None if out.is_terminal else COLUMNS, highlight=False).print(table(rows))
    return finish(root, arguments.keep, any(lost(outcome) for outcome, _ in rows), out)


def finish(root: Path, keep: bool, failed: bool, out: Console) -> int:
    """Remove the runs, unless something was lost: then they are what there is to look at."""
    if failed or keep:
        out.print(f"the runs are in {root}", highlight=False)
    else:
        shutil.rmtree(root)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
