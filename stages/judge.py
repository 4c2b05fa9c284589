"""Measures a judge on held-out examples, before anybody relies on it: what `r1pipe judge` runs. No training.

    python stages/judge.py FOLDER     holds config.json, and measurement.json with what is to be asked

The folder keeps every answer of the judge, so that a measurement that was stopped goes on where it was, and
quality.json, without which no stage uses the judge.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime

from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import TaskID

from r1pipe.config import EvaluateConfig
from r1pipe.config.fields import build
from r1pipe.config.judge import version_of
from r1pipe.core.errors import DataError
from r1pipe.rewards.judge.measurement import Measurement, Progress, measure
from r1pipe.runs.files import read_object, write_json
from r1pipe.runs.judge_quality import QUALITY, Quality
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.judging import held_out, open_unmeasured, summary_of
from r1pipe.train.run import open_run


def main(folder: str) -> None:
    logging.basicConfig(stream=sys.stderr)  # before open_run does: standard output is the command's
    logging.disable(logging.ERROR)  # error.txt has it
    with open_run(folder, EvaluateConfig) as run, shown() as progress:
        settings = build(Measurement, read_object(run.folder.path / "measurement.json"))
        source, ranks = run.load_data(evaluates=False), Ranks(run.config.engine)
        judge = open_unmeasured(run, ranks)
        examples = held_out(source, judge, settings, progress)
        kinds = measure(judge, examples, settings, progress)
        if not kinds:
            raise DataError(
                f"data={run.config.data.name} has no preference pairs, safety labels or questions with "
                "answers to measure a judge on; choose other data"
            )
        quality: Quality = {
            "judge": summary_of(run, ranks, judge),
            "prompts": version_of(judge.prompts),
            "asked": asdict(judge.config),
            "data": {"name": run.config.data.name, "hash": source.hash, "split": settings.split},
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "kinds": kinds,
        }
        write_json(run.folder.path / QUALITY, quality, indent=2)


def tell(what: str, done: int, total: int) -> None:
    if done == total:
        print(f"{what}: {done} asked", file=sys.stderr)


@contextmanager
def shown() -> Iterator[Progress]:
    """Bars on a terminal; elsewhere a line for each kind of question when it is done."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield (
            lambda what, done, total: (
                print(f"{what}: {done} asked", file=sys.stderr) if done == total else None
            )
        )
        return
    with Bars(console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done)

        yield progress


if __name__ == "__main__":
    main(sys.argv[1])
