"""Distillation methods, beside each other: points gained per teacher token and per second.

    make bench-distill ARGS="--parent RUN_ID --teacher RUN_ID --before 6.7 -- model=student"

Each method is a run of stage=distill from the same student and teacher, on as many prompts; a run that has
finished under the root is not run again. Points are of pass@1 on held-out problems, less the student's own.
Teacher tokens: those it wrote, and those of the student's or its own that it read for their probabilities.
Seconds are of asking, drawing, reading and training, without start and evaluation: they mean something where
nothing else ran on the machine.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from r1pipe.config import DistillConfig
from r1pipe.config.compose import compose
from r1pipe.config.distill_unused import why_unused
from r1pipe.core.errors import R1pipeError
from r1pipe.runs.files import metric_lines
from r1pipe.runs.results import StoredRun, stored_runs

SCORED = ["stage.extract=feedback", "stage.feedback.by=likelihood"]
METHODS: dict[str, list[str]] = {
    "label-sft": [],
    "label-divergence": ["stage.transfer=divergence"],
    "label-ranking": ["stage.transfer=ranking"],
    "label-ranking-simpo": ["stage.transfer=ranking", "stage.ranking.loss=simpo", "stage.ranking.beta=2.0"],
    "label-rl": ["stage.transfer=rl"],
    "distribution-divergence": ["stage.extract=distribution", "stage.transfer=divergence"],
    "distribution-rl": ["stage.extract=distribution", "stage.transfer=rl"],
    "feedback-sft": [
        "stage.extract=feedback",
        "stage.feedback.by=likelihood",
        "stage.feedback.min_score=0.0",
    ],
    "feedback-ranking": ["stage.extract=feedback", "stage.feedback.by=likelihood", "stage.transfer=ranking"],
    "feedback-rl": ["stage.extract=feedback", "stage.feedback.by=likelihood", "stage.transfer=rl"],
}
NAME = "method-{method}-s{seed}"  # of a run's pipeline
TEACHER_TOKENS = "distill/teacher_tokens"
# whose teacher tokens it reads; others name what it has written, which its record counts
READS = ("label-divergence", "distribution-rl")
HEADINGS = ("method", "seeds", "pass@1", "gained", "written", "read", "points/10k tokens", "points/min")
WORK = ("extracting", "sampling", "teacher", "reward", "update")  # phases of the record


@dataclass(frozen=True)
class Found:
    """One run of a method."""

    points: float  # of pass@1 gained, in percent
    pass_at_1: float  # in percent
    written: float  # the teacher's tokens
    read: float
    seconds: float


def found_in(run: StoredRun, method: str, before: float) -> Found:
    record: Any = run.record
    reached = 100 * record["metrics"]["pass_at_1"]
    asked = record.get("teacher") or {}
    lines = [line for _, line in metric_lines(run.folder.metrics)]
    read = sum(line.get(TEACHER_TOKENS, 0.0) for line in lines) if method in READS else 0.0
    if method.startswith("feedback"):  # its prompt is what it reads
        read += asked.get("prompt_tokens", 0)
    seconds = sum(record["seconds"].get(name, 0.0) for name in WORK)
    return Found(reached - before, reached, asked.get("completion_tokens", 0), read, seconds)


def finished(root: Path) -> dict[str, StoredRun]:
    """Pipeline -> its newest finished run."""
    return {run.config["pipeline"]: run for run in stored_runs(root) if run.record is not None}


def go(given: argparse.Namespace) -> None:
    """Run what is missing, one after the other."""
    command = [sys.executable, "-m", "r1pipe", "run", f"root={given.root}", f"parent={given.parent}"]
    for seed in range(given.seeds):
        for method in given.methods:
            name = NAME.format(method=method, seed=seed)
            if name in finished(given.root):
                continue
            words = ["stage=distill", f"teacher={given.teacher}", f"seed={seed}", f"pipeline={name}"]
            more = read_by([*words, *METHODS[method]], given.overrides)
            done = subprocess.run([*command, *words, *METHODS[method], *more], check=False)
            if done.returncode:
                print(f"bench: {name} has failed with exit code {done.returncode}", file=sys.stderr)


def read_by(words: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """The overrides without those that the method of these words does not read, which a run refuses."""
    config = compose([*words, *(word for word in overrides if not word.startswith("stage."))]).config
    assert isinstance(config.stage, DistillConfig)
    keys = {word: word.partition("=")[0] for word in overrides}
    return [word for word in overrides if not why_unused(keys[word], config.stage, config.teacher)]


def rows(root: Path, before: float, methods: Sequence[str]) -> Iterator[tuple[str, list[Found]]]:
    runs = finished(root)
    for method in methods:
        named = re.compile(NAME.format(method=method, seed=r"\d+"))
        of_method = [run for name, run in runs.items() if named.fullmatch(name)]
        if of_method:
            yield method, [found_in(run, method, before) for run in of_method]


def table(found: Sequence[tuple[str, list[Found]]], before: float) -> Table:
    shown = Table(title=f"from {before:.1f} points; means over seeds, least and most in brackets")
    for heading in HEADINGS:
        shown.add_column(heading, justify="left" if heading == "method" else "right")
    for method, runs in found:
        points = [run.points for run in runs]
        tokens = fmean(run.written + run.read for run in runs)
        seconds = fmean(run.seconds for run in runs)
        shown.add_row(
            method,
            str(len(runs)),
            f"{fmean(run.pass_at_1 for run in runs):.1f}",
            f"{fmean(points):+.1f} ({min(points):+.1f} to {max(points):+.1f})",
            f"{fmean(run.written for run in runs):,.0f}",
            f"{fmean(run.read for run in runs):,.0f}",
            f"{1e4 * fmean(points) / tokens:+.2f}" if tokens else "",
            f"{60 * fmean(points) / seconds:+.2f}" if seconds else "",
        )
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    """Run and print; 0, or 2 with one line where there is nothing to show."""
    parser = argparse.ArgumentParser(prog="python -m bench.distill_methods", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("runs"))
    parser.add_argument("--parent", required=True, help="the student: a run or a checkpoint")
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--before", type=float, required=True, help="the student's own pass@1, in percent")
    parser.add_argument("--seeds", type=int, default=3, help="0: show what has been run")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("overrides", nargs="*", default=[], help="of every run, after --")
    given = parser.parse_args(arguments)
    try:
        go(given)
        found = [*rows(given.root, given.before, given.methods)]
        if not found:
            raise R1pipeError(f"no method has a finished run under {given.root}")
    except R1pipeError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    Console(width=None if sys.stdout.isatty() else 150).print(table(found, given.before))
    return 0


if __name__ == "__main__":
    sys.exit(main())
