"""What a running job is doing, on the screen: tails progress.jsonl and metrics.jsonl of the run folder.

On a terminal a live display: one line for the training steps, one for what happens inside a step and, in
reinforcement, a panel with the step's metrics and one completion. Without a terminal quiet lines, one for
each new phase and one about every ten seconds.
"""

import time
from collections import deque
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.text import Text

from r1pipe.core.formatting import duration, number
from r1pipe.core.paths import RunFolder
from r1pipe.launch.panel import Step
from r1pipe.runs.files import Tail

REFRESHES = 4  # of the live display, a second: the job needs the cores
QUIET_S = 10.0  # seconds between plain lines
WINDOW_S = 30.0  # the rate is that of the last so many seconds
OUTER = "train"  # the phase whose line stays; others come and go beneath it


class Phase:
    """Newest state of one kind of work, and how fast it goes."""

    def __init__(self, what: str):
        self.what = what
        self.done = 0.0
        self.total = 0.0
        self.unit = ""
        self.show: dict[str, float] = {}
        self._points: deque[tuple[float, float]] = deque()  # (time, done)

    def take(self, row: dict) -> None:
        done, at = _number(row.get("done")), _number(row.get("time"))
        total = _number(row.get("total"))
        if done < self.done or total != self.total:  # it began anew (the next step's sampling)
            self._points.clear()
        self.done, self.total, self.unit = done, total, str(row.get("unit") or "")
        show = row.get("show")
        if isinstance(show, dict) and show:
            self.show = {str(name): value for name, value in show.items() if isinstance(value, int | float)}
        self._points.append((at, done))
        while at - self._points[0][0] > WINDOW_S and len(self._points) > 2:
            self._points.popleft()

    @property
    def rate(self) -> float | None:
        """Units per second, or None while fewer than two points are known."""
        if not self._points:
            return None
        (start, first), (end, last) = self._points[0], self._points[-1]
        return (last - first) / (end - start) if end > start and last > first else None

    @property
    def left(self) -> float | None:
        return (self.total - self.done) / self.rate if self.rate and self.total >= self.done else None

    def count(self) -> str:
        total = f"/{self.total:,.0f}" if self.total else ""
        return f"{self.done:,.0f}{total} {self.unit}"

    def pace(self) -> str:
        if self.rate is None:
            return ""
        return f"{number(self.rate)}/s" if self.rate >= 1 else f"{number(1 / self.rate)} s each"

    def numbers(self) -> str:
        return "  ".join(f"{name} {number(value)}" for name, value in self.show.items())


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0


class Display:
    """Shows the job of one run folder while it runs: `poll()` often, from its start on; `close()` at the end.

    Lines that the files held before (of an interrupted run that resumes) are not shown again.
    """

    def __init__(self, run_dir: Path | str, stage: str, console: Console | None = None):
        self.stage = stage
        self.console = console or Console(stderr=True)
        self.phases: dict[str, Phase] = {}
        run = RunFolder(run_dir)
        self._tail = Tail(run.progress, at_end=True)
        self._metrics = Tail(run.metrics, at_end=True)
        self._step = Step(stage)
        self._began = time.monotonic()
        self._said_at = self._began
        self._inner = ""  # the phase inside a step that was seen last
        self._lines: dict[str, TaskID] = {}
        self._live: Live | None = None
        if self.console.is_terminal:
            self._progress = self._make_progress()
            self._live = Live(
                Group(self._progress, self._step),
                console=self.console,
                refresh_per_second=REFRESHES,
                transient=True,
            )

    def _make_progress(self) -> Progress:
        progress = Progress(
            SpinnerColumn(finished_text=" "),
            TextColumn("[bold]{task.fields[stage]}[/] {task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[count]}"),
            TextColumn("[dim]{task.fields[pace]}[/]"),
            TextColumn("[cyan]{task.fields[left]}[/]"),
            TextColumn("{task.fields[numbers]}"),
            console=self.console,
        )
        self._lines["starting"] = progress.add_task("starting", total=None, **self._fields(Phase("")))
        return progress

    def _fields(self, phase: Phase) -> dict[str, Any]:
        left = phase.left
        return {
            "stage": self.stage,
            "count": phase.count() if phase.done or phase.total else "",
            "pace": phase.pace(),
            "left": f"{duration(left)} left" if left else "",
            "numbers": "" if self._step.metrics else phase.numbers(),  # the panel has them
        }

    def poll(self) -> None:
        """Shows what the job wrote since the last call."""
        if self._live is not None and not self._live.is_started:
            self._live.start()
        for row in self._tail.read():
            if "say" in row:
                self.say(str(row["say"]))
                continue
            if isinstance(sample := row.get("sample"), dict):
                self._step.sample = sample
                continue
            what = str(row.get("what") or "working")
            new = what not in self.phases
            self.phases.setdefault(what, Phase(what)).take(row)
            self._inner = what if what != OUTER else self._inner
            if self._live is None and (new or time.monotonic() - self._said_at >= QUIET_S):
                self._plain_line()
        if self._live is not None:
            for row in self._metrics.read():
                self._step.take(row)
            if self.phases:
                self._refresh(self._progress)

    def say(self, text: str) -> None:
        """One line for the user, above the live display."""
        (self._live.console if self._live else self.console).print(Text(text), soft_wrap=True)

    def close(self) -> None:
        """Takes the live lines away and leaves one line that says how long it took."""
        self.poll()
        if self._live is not None:
            self._live.stop()
        phase = next(iter(self._shown()), None)
        told = f"{phase.what} {phase.count()}  {phase.numbers()}" if phase else "nothing reported"
        line = Text.assemble((self.stage, "bold"), f"  {told}  in {duration(time.monotonic() - self._began)}")
        self.console.print(line, soft_wrap=True)

    def _plain_line(self) -> None:
        self._said_at = time.monotonic()
        parts = []
        for phase in self._shown():
            left = f", {duration(phase.left)} left" if phase.left else ""
            parts.append("  ".join(filter(None, [f"{phase.what} {phase.count()}{left}", phase.numbers()])))
        self.console.print(Text(f"{self.stage}  " + " | ".join(parts)), soft_wrap=True)

    def _shown(self) -> list[Phase]:
        return [self.phases[name] for name in (OUTER, self._inner) if name in self.phases]

    def _refresh(self, progress: Progress) -> None:
        shown = self._shown()
        for name in self._lines.keys() - {phase.what for phase in shown}:
            progress.remove_task(self._lines.pop(name))
        for phase in shown:
            fields = self._fields(phase)
            if phase.what not in self._lines:
                self._lines[phase.what] = progress.add_task(phase.what, total=None, **fields)
            progress.update(
                self._lines[phase.what], completed=phase.done, total=phase.total or None, **fields
            )
