"""The report of a reproduction, and where its files are."""

from pathlib import Path

from r1pipe.cli.report import write_report
from r1pipe.core.paths import RunFolder
from r1pipe.core.redaction import without_login
from r1pipe.launch import pipeline
from r1pipe.tracking import add_report, store_uri


def is_older(page: Path, finished: list[RunFolder]) -> bool:
    """Whether the page lacks one of these runs: a kill may have come between the last record and the page."""
    newest = max(run.record.stat().st_mtime_ns for run in finished)
    return not page.exists() or page.stat().st_mtime_ns < newest


def print_outputs(outcome: pipeline.Outcome) -> None:
    """Write the report if it is out of date, and print where the files are and how to open them."""
    config = outcome.config
    if len(outcome.finished) < len(config.recipe.stages):
        return
    last = outcome.finished[len(config.recipe.stages) - 1].path
    root = Path(config.root).resolve()
    page = root / "report.html"
    if outcome.worked or is_older(page, outcome.finished):
        write_report(root, pipeline.finished_run_ids(config), path=page)
        add_report(config, page)
    print(f"report       {page}  (open it in a browser)")
    print(f"checkpoints  {root}/<run id>/checkpoints  (r1pipe chat {last}; r1pipe lineage {last})")
    if config.tracking.enabled:
        store = without_login(store_uri(root, config.tracking.uri))
        print(f"MLflow       {store}  (r1pipe ui root={config.root})")
