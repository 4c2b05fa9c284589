"""`r1pipe plan --timeline`: a pipeline's last step, on the screen and as a picture."""

from pathlib import Path

from r1pipe.cli.options import composed
from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.paths import RunFolder
from r1pipe.core.terminal import console_of
from r1pipe.plan import timeline

WIDTH = 120  # letters without a terminal


def show(run: str, overrides: list[str], svg: Path | None) -> None:
    """`run`: a run folder, or a run id below root. Raises ConfigError where it has no timeline, and
    EnvironmentProblem where the picture cannot be written."""
    folder = Path(run) if Path(run).is_dir() else Path(composed(overrides).root) / run
    found = timeline.read(RunFolder(folder).timeline)
    console = console_of(WIDTH)
    for line in timeline.text(found, console.width - 4):
        console.print(line, highlight=False, markup=False)
    console.print(timeline.summary(found), highlight=False)
    if svg is not None:
        try:
            svg.write_text(timeline.svg([found]), encoding="utf-8")
        except OSError as error:
            raise EnvironmentProblem(
                f"{svg} cannot be written: {error.strerror}; give another --svg"
            ) from None
