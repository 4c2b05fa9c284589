"""report.html: every stage of a reproduction on one page, in one file, without network; and curves.png.

load       what run folders hold, missing parts allowed
published  R1's published numbers, and our runs of the same benchmarks beside them
story      what comes first: curves of reinforcement, one problem along the way, strategies
charts     its curves and areas
plots      what is drawn (matplotlib), as SVG that follows the page's colours, or PNG
page       what the page says
templates  how the pages look: the report, a lineage, and their style; whatever they show is escaped
"""

from collections.abc import Sequence
from pathlib import Path

from r1pipe.cli.report import published
from r1pipe.cli.report.load import load_runs, other_runs
from r1pipe.cli.report.page import page
from r1pipe.cli.report.plots import write_curves
from r1pipe.cli.report.story import picture
from r1pipe.core.errors import CheckpointError, EnvironmentProblem
from r1pipe.runs.files import write_text

__all__ = ["write_report"]


def write_report(root: Path | str, runs: Sequence[str] | None = None, pipeline: str | None = None) -> Path:
    """Writes `<root>/report.html`, and curves.png beside it.

    Args:
        root: where run folders are.
        runs: run ids or folders; the newest finished run of each stage and seed by default.
        pipeline: only runs of this pipeline; all by default.

    Raises CheckpointError where no run has finished, EnvironmentProblem where the file cannot be written.
    """
    chosen = load_runs(root, runs, pipeline)
    if not chosen:
        raise CheckpointError(f"no finished run under {root}; `r1pipe reproduce` makes them")
    target = Path(root) / "report.html"
    measured = [run for run in chosen if run.measured]
    stages = [run for run in chosen if not run.measured] or measured
    text = page(stages, other_runs(root, chosen), published.beside(measured))
    try:
        write_curves(*picture(stages), target.with_name("curves.png"))
        write_text(target, text)
    except OSError as error:
        raise EnvironmentProblem(
            f"{target} cannot be written ({error.strerror}); run it where you may write, as a copy of {root}"
        ) from None
    return target
