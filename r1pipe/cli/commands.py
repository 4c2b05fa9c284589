"""The command line. Commands import what they need when they run: `r1pipe --help` answers at once."""

import json
import signal
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from r1pipe.cli import commands_on_runs, commands_planning, scripts
from r1pipe.cli.options import Checkpoint, Overrides, composed
from r1pipe.cli.serve import serve
from r1pipe.config import RunConfig
from r1pipe.config.groups import GROUPS, with_stage
from r1pipe.core import terminal
from r1pipe.core.errors import R1pipeError
from r1pipe.core.paths import RunFolder
from r1pipe.runs import stopping

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="DeepSeek-R1's recipe as a pipeline of DeepSpeed jobs, each handed to the next with its lineage.",
    epilog=f"OVERRIDES are Hydra's, everywhere: group=option ({', '.join(GROUPS)}), key=value, +key=value, "
    "~key. CHECKPOINT: a run id, a path, a stage name (its newest finished run), or models:/name@alias.",
)


@app.command()
def run(
    overrides: Overrides = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start anew, even if this run is half done.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the command; a new run's folder is written.")
    ] = False,
    multirun: Annotated[
        bool, typer.Option("--multirun", "-m", help="Run every combination of values: seed=0,1")
    ] = False,
) -> int:
    """Run one stage as one DeepSpeed job: run stage=grpo

    An unfinished run resumes where it stopped, but not with a config that computes something else: that is
    refused with what differs. One that is running is followed to its end. A finished run is left alone and a
    new one starts, unless a kill kept the command from saying that it is done, or a larger stage.max_steps
    extends it. --multirun takes Hydra's syntax for sweeps, and each run stays as it is once it has finished.
    """
    from r1pipe.launch import pipeline

    if multirun:
        from r1pipe.cli.sweep import sweep

        return sweep(overrides or [], fresh, dry_run)
    config = composed(with_stage(overrides or []))
    if dry_run:
        print(pipeline.dry_run(config, fresh))
        return 0
    return run_to_end(config, fresh)


def run_to_end(config: RunConfig, fresh: bool = False) -> int:
    """Run one stage and show its row of the table; the job's exit code."""
    from r1pipe.cli import compare
    from r1pipe.launch import parents, pipeline
    from r1pipe.runs import results
    from r1pipe.runs.results import StoredRun

    plan = pipeline.plan_run(parents.with_parents(config), fresh)
    code = pipeline.run_stage(plan)
    if plan.done:
        compare.show([compare.without_warnings(results.row(StoredRun.read(plan.run)))])
        print(f"run folder: {plan.run.path}")
    return code


@app.command()
def doctor(
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="An object with all checks, for scripts.")] = False,
) -> int:
    """Look a stage over before it runs, in a minute: doctor stage=grpo

    Exit code 1 if a check failed: each shows what was measured and the remedy.
    """
    from r1pipe.cli import doctor as checks

    return checks.doctor(with_stage(overrides or []), as_json)


@app.command()
def judge(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="CHECKPOINT, a Hugging Face folder, or a server's URL")
    ],
    overrides: Overrides = None,
    pairs: Annotated[int | None, typer.Option(min=1, help="held-out pairs that it compares")] = None,
    labels: Annotated[int | None, typer.Option(min=1, help="responses that it rates for harm")] = None,
    references: Annotated[int | None, typer.Option(min=1, help="questions with a reference answer")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="An object with all figures.")] = False,
) -> int:
    """Measure a judge before it is used: judge URL data=preferences data.path=DIR

    Agreement with held-out labels, position bias, length bias, self-preference, consistency, and whether it
    obeys what an answer tells it. Stages with judge=MODEL refuse a judge that was not measured with the same
    stage.judge keys. Exit code 1 if it is beyond one of their bounds.
    """
    from r1pipe.cli import judge as measurement

    asked = {"pairs": pairs, "labels": labels, "references": references}
    return measurement.judge(model, overrides or [], asked, as_json)


@app.command()
def reproduce(overrides: Overrides = None) -> int:
    """Run a recipe's stages and controls: reproduce recipe=laptop

    Run it again and it resumes where it stopped; once all is done, it prints the table again.
    """
    from r1pipe import tracking
    from r1pipe.cli import compare
    from r1pipe.cli.report import write_report
    from r1pipe.core.redaction import without_login
    from r1pipe.launch import pipeline
    from r1pipe.runs import results
    from r1pipe.runs.results import StoredRun

    outcome = pipeline.reproduce(overrides or [])
    config, finished = outcome.config, outcome.finished
    compare.show([results.row(StoredRun.read(run)) for run in finished])
    if outcome.code or len(finished) < len(config.recipe.stages):
        return outcome.code
    root = Path(config.root).resolve()
    page = root / "report.html"
    newest = max(run.record.stat().st_mtime_ns for run in finished)
    # a kill may have come between the last record and the page
    if outcome.worked or not page.exists() or page.stat().st_mtime_ns < newest:
        write_report(root, pipeline.finished_run_ids(config))
        write_cards(root, finished[len(config.recipe.stages) - 1])
        tracking.add_report(config, page)
    last = finished[len(config.recipe.stages) - 1].path
    print(f"report       {page}  (open it in a browser)")
    print(f"checkpoints  {root}/<run id>/checkpoints  (r1pipe chat {last}; r1pipe lineage {last})")
    if config.tracking.enabled:
        store = without_login(tracking.store_uri(root, config.tracking.uri))
        print(f"MLflow       {store}  (r1pipe ui root={config.root})")
    return 0


def write_cards(root: Path, last: RunFolder) -> None:
    """Model card and data card of a recipe's last checkpoint, beside the report."""
    from r1pipe.cli import cards
    from r1pipe.runs import lineage

    (root / "cards").mkdir(exist_ok=True)
    cards.write(root / "cards", list(lineage.ancestors(lineage.checkpoint_of_run(last))))


@app.command(name="config")
def show_config(
    overrides: Overrides = None,
    help_keys: Annotated[bool, typer.Option("--help-keys", help="Explain each key, too.")] = False,
) -> None:
    """Print the whole resolved config, with where each value comes from: config stage=grpo"""
    from r1pipe.config import to_mapping
    from r1pipe.config.compose import compose
    from r1pipe.config.describe import descriptions
    from r1pipe.config.groups import flat, upwards
    from r1pipe.core.redaction import publishable

    found = compose(overrides or [])
    values = dict(flat(publishable(to_mapping(found.config))))
    shown = {key: f"{key}={json.dumps(values[key], ensure_ascii=False)}" for key in found.sources}
    width = min(60, max(map(len, shown.values())))
    described = dict(descriptions(found.config)) if help_keys else {}
    for key, source in found.sources.items():
        print(f"{shown[key]:<{width}}  # {source}")
        meaning = next((described[part] for part in upwards(key) if part in described), "")
        if meaning:
            print(textwrap.fill(meaning, 100, initial_indent="    ", subsequent_indent="    "))


@app.command(name="eval")
def evaluate(checkpoint: Checkpoint, overrides: Overrides = None) -> int:
    """Evaluate any checkpoint on held-out problems, or on a benchmark: eval grpo stage.eval.problems=100

    The data and the seed are those of the checkpoint's own run, unless overridden. With benchmark=math500
    data.path=FILE all is as R1 measured it (the table in docs/benchmarks.md), and the seed is 0.
    """
    from r1pipe.launch import parents
    from r1pipe.runs import lineage

    given = overrides or []
    keys = {line: line.partition("=")[0].lstrip("+~") for line in given}
    elsewhere = [line for line, key in keys.items() if key.partition(".")[0] not in ("data", "benchmark")]
    measured = [*elsewhere, "stage=evaluate", f"parent={json.dumps(checkpoint)}"]
    parent = parents.resolve(checkpoint, lineage.SearchPath.of(composed(measured)))
    of_benchmark = {"data", "seed"} if "benchmark" in keys.values() else set()
    taken = lineage.settings_of(parent, {*keys.values(), *of_benchmark})
    config = composed([*taken, *given, "stage=evaluate", f"parent={json.dumps(parent.checkpoint)}"])
    print(lineage.measured_data(parent, config))
    return run_to_end(config)


COMMANDS: tuple[Callable[..., int | None], ...] = (
    *(
        scripts.data,
        scripts.generate,
        scripts.chat,
        serve,
        scripts.score,
        scripts.export,
        scripts.import_weights,
    ),
    *(commands_on_runs.compare, commands_on_runs.report, commands_on_runs.samples, commands_on_runs.lineage),
    *(commands_on_runs.provenance, commands_on_runs.audit),
    *(commands_on_runs.sync, commands_on_runs.prune, commands_on_runs.ui),
    *(commands_planning.plan, commands_planning.cost),
)
for command in COMMANDS:
    app.command(name="import" if command is scripts.import_weights else None)(command)


def main() -> None:
    """Entry point: exit code 2 and one line for what a user got wrong."""
    terminal.run(call)


def call() -> int | None:
    try:
        with stopping.handling(stopping.leave, (signal.SIGTERM, signal.SIGHUP)):
            return app(standalone_mode=False)
    except typer.TyperException as error:
        raise R1pipeError(error.format_message()) from None  # empty where Typer has just printed the help
