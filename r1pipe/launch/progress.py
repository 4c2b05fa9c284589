"""What a running job is doing, on the screen: reads progress.jsonl and metrics.jsonl of the run folder.

A terminal gets a live display: a line for the training steps, a line for the work inside a step and, in
reinforcement learning, a panel with the step's metrics and one completion. Anything else gets plain lines:
one for each new phase, and one about every ten seconds.
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
    """The newest state of one kind of work, and how fast it progresses."""

    def __init__(self, what: str):
        self.what = what
        self.done = self.total = 0.0
        self.unit = self.numbers = ""
        self._points: deque[tuple[float, float]] = deque()  # (time, done)

    def update(self, row: dict) -> None:
        """Take a line of progress.jsonl."""
        values = (row.get(key) for key in ("done", "total", "time"))
        done, total, at = (float(value) if isinstance(value, int | float) else 0.0 for value in values)
        if done < self.done or total != self.total:  # it began again (the next step's sampling)
            self._points.clear()
        self.done, self.total, self.unit = done, total, str(row.get("unit") or "")
        show = row.get("show")
        if isinstance(show, dict) and show:
            figures = {name: value for name, value in show.items() if isinstance(value, int | float)}
            self.numbers = "  ".join(f"{name} {number(value)}" for name, value in figures.items())
        self._points.append((at, done))
        while at - self._points[0][0] > WINDOW_S and len(self._points) > 2:
            self._points.popleft()

    @property
    def count(self) -> str:
        total = f"/{self.total:,.0f}" if self.total else ""
        return f"{self.done:,.0f}{total} {self.unit}"

    def speed(self) -> tuple[str, str]:
        """`2.5/s` or `4 s each`, and `3m05s left`; empty when unknown."""
        if not self._points:
            return "", ""
        (start, first), (end, last) = self._points[0], self._points[-1]
        if end <= start or last <= first:
            return "", ""
        rate = (last - first) / (end - start)  # units per second
        pace = f"{number(rate)}/s" if rate >= 1 else f"{number(1 / rate)} s each"
        remaining = f"{duration((self.total - self.done) / rate)} left" if self.total > self.done else ""
        return pace, remaining


class Display:
    """Shows one run folder's job: call `poll()` often, from the job's start on, and `close()` at the end.

    Lines that an interrupted run left in the files are not shown again when it resumes.
    """

    def __init__(self, run_dir: Path | str, stage: str, console: Console | None = None):
        self.stage = stage
        self.console = console or Console(stderr=True)
        self.phases: dict[str, Phase] = {}
        run = RunFolder(run_dir)
        self._progress_rows = Tail(run.progress, at_end=True)
        self._metrics_rows = Tail(run.metrics, at_end=True)
        self._step = Step(stage)
        self._started_at = self._printed_at = time.monotonic()
        self._inner = ""  # the newest phase inside a step
        self._live: Live | None = None
        if self.console.is_terminal:
            self._bars = Progress(
                SpinnerColumn(finished_text=" "),
                TextColumn("[bold]{task.fields[stage]}[/] {task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[count]}"),
                TextColumn("[dim]{task.fields[pace]}[/]"),
                TextColumn("[cyan]{task.fields[remaining]}[/]"),
                TextColumn("{task.fields[numbers]}"),
                console=self.console,
            )
            self._tasks: dict[str, TaskID] = {}
            self._show_bars([Phase("starting")])
            self._live = Live(
                Group(self._bars, self._step),
                console=self.console,
                refresh_per_second=REFRESHES,
                transient=True,
            )

    def poll(self) -> None:
        """Show what the job wrote since the last call."""
        if self._live is not None and not self._live.is_started:
            self._live.start()
        for row in self._progress_rows.read():
            if "say" in row:
                self.say(str(row["say"]))
            elif isinstance(sample := row.get("sample"), dict):
                self._step.sample = sample
            else:
                what = str(row.get("what") or "working")
                is_new = what not in self.phases
                self.phases.setdefault(what, Phase(what)).update(row)
                self._inner = what if what != OUTER else self._inner
                if self._live is None and (is_new or time.monotonic() - self._printed_at >= QUIET_S):
                    self._print_line()
        if self._live is None:
            return
        for row in self._metrics_rows.read():
            self._step.update(row)
        if phases := self._visible_phases():
            self._show_bars(phases)

    def _show_bars(self, phases: list[Phase]) -> None:
        for name in self._tasks.keys() - {phase.what for phase in phases}:
            self._bars.remove_task(self._tasks.pop(name))
        for phase in phases:
            pace, remaining = phase.speed()
            fields: dict[str, Any] = {
                "stage": self.stage,
                "count": phase.count if phase.done or phase.total else "",
                "pace": pace,
                "remaining": remaining,
                "numbers": "" if self._step.metrics else phase.numbers,  # the panel has them
            }
            if phase.what not in self._tasks:
                self._tasks[phase.what] = self._bars.add_task(phase.what, total=None, **fields)
            self._bars.update(
                self._tasks[phase.what], completed=phase.done, total=phase.total or None, **fields
            )

    def say(self, text: str) -> None:
        """Print one line for the user, above the live display."""
        (self._live.console if self._live else self.console).print(Text(text), soft_wrap=True)

    def close(self) -> None:
        """Replace the live display by one line with the time that the job took."""
        self.poll()
        if self._live is not None:
            self._live.stop()
        phase = next(iter(self._visible_phases()), None)
        summary = f"{phase.what} {phase.count}  {phase.numbers}" if phase else "nothing reported"
        elapsed = duration(time.monotonic() - self._started_at)
        self.console.print(Text.assemble((self.stage, "bold"), f"  {summary}  in {elapsed}"), soft_wrap=True)

    def _print_line(self) -> None:
        self._printed_at = time.monotonic()
        parts = []
        for phase in self._visible_phases():
            count = ", ".join(filter(None, [f"{phase.what} {phase.count}", phase.speed()[1]]))
            parts.append("  ".join(filter(None, [count, phase.numbers])))
        self.console.print(Text(f"{self.stage}  " + " | ".join(parts)), soft_wrap=True)

    def _visible_phases(self) -> list[Phase]:
        return [self.phases[name] for name in (OUTER, self._inner) if name in self.phases]
