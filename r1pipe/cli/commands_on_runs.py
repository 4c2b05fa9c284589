"""The commands on runs: table, report, samples, lineage, MLflow's view of them, and removing them."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from r1pipe.cli.options import Checkpoint, Overrides, complete_run, composed, pipeline_in, split
from r1pipe.core.errors import EnvironmentProblem

if TYPE_CHECKING:
    from r1pipe.runs import lineage as family


def compare(
    runs: Annotated[list[str] | None, typer.Argument(metavar="[RUNS] [OVERRIDES]...")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A list of objects, for scripts.")] = False,
    paired: Annotated[
        bool, typer.Option("--paired", help="Two runs, problem by problem; an object with --json.")
    ] = False,
) -> None:
    """The table of stages: the newest finished run of each stage and seed, or the runs named.

    RUNS: run ids, paths, or stages: compare grpo shows every finished run of that stage in this pipeline.
    Named runs have a row each, with the settings that differ between runs of one stage. --paired says how far
    apart two evaluations of the same problems are, how surely, and which problems each won.
    """
    from r1pipe.cli import compare as table
    from r1pipe.cli import paired as by_problem
    from r1pipe.runs import results

    named, overrides = split(runs)
    config = composed(overrides)
    if paired:
        by_problem.compare(config.root, named, config.pipeline, as_json)
        return
    rows = results.rows(config.root, named, config.pipeline if named else pipeline_in(overrides))
    if as_json:
        print(results.as_json(rows))
    else:
        table.show(rows)


def report(overrides: Overrides = None) -> None:
    """Write report.html: table, curves, samples and cost of all stages, in one file."""
    from r1pipe.cli.report import write_report

    print(write_report(composed(overrides).root, pipeline=pipeline_in(overrides)))


def samples(
    name: Annotated[
        str,
        typer.Argument(
            metavar="RUN", help="run id, path or stage name (its newest run)", autocompletion=complete_run
        ),
    ],
    overrides: Overrides = None,
    step: Annotated[str | None, typer.Option(metavar="STEPS", help="7 or 10-20")] = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(metavar="BOUND", help="'>=1', 0.5..1, accuracy=0; several: all must hold"),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(metavar="WORDS", help="in the prompt or the answer; /a regular expression/"),
    ] = None,
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="best, worst and odd ones, each")] = 3,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per row, uncut.")] = False,
) -> None:
    """A run's best, worst and odd completions: samples grpo --step 10-20 --reward accuracy=0

    Odd: rewarded (above its group's mean) though cut off, badly formed, in another language or repeating
    itself; punished though right; or without a verdict, as a verifier failed. A stage without rollouts shows
    held-out prompts of its samples.json. Overrides say where the run is: root=DIR, pipeline=NAME.
    """
    from r1pipe.cli import samples as shown

    shown.samples(name, overrides or [], shown.Query.of(reward or [], text, step, limit), as_json)


def lineage(
    checkpoint: Checkpoint,
    overrides: Overrides = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with the graph, too.")
    ] = None,
) -> int:
    """Where a checkpoint comes from: weight edges, data edges, and whether each is still what it was.

    Exit code 1 if anything on the way is gone, broken or edited.
    """
    from r1pipe.cli import lineage as shown

    found = ancestry(checkpoint, overrides)
    shown.show(found)
    if html is not None:
        shown.write_page(found, html)
    return 1 if any(ancestor.problem for ancestor in found) else 0


def provenance(
    checkpoint: Checkpoint,
    overrides: Overrides = None,
    sample: Annotated[
        str | None, typer.Option(metavar="ID", help="a prompt_id: where its samples were learned from")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="An object with everything, for scripts.")] = False,
) -> None:
    """What a checkpoint was trained on, over its whole lineage, in shares: provenance all_scenario

    By source, licence, language, task, teacher, judge and stage; what no record tells is a row of its own.
    """
    from r1pipe.cli import provenance as shown

    found = ancestry(checkpoint, overrides)
    if sample is not None:
        places = shown.way_of(found, sample)
        print(json.dumps(places, ensure_ascii=False, indent=1)) if as_json else shown.show_way(places)
        return
    summary = shown.summed_up(found)
    print(json.dumps(summary, ensure_ascii=False, indent=1)) if as_json else shown.show(summary)


def audit(
    checkpoint: Checkpoint,
    overrides: Overrides = None,
    checklist: Annotated[
        Path | None, typer.Option(metavar="FILE", help="another one than conf/audit/checklist.yaml")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="An object with everything, for scripts.")] = False,
) -> int:
    """What should be known of a checkpoint, answered from records or marked missing: audit all_scenario

    Exit code 1 if something required is missing.
    """
    from r1pipe.cli import audit as shown

    result = shown.audit(ancestry(checkpoint, overrides), checklist)
    print(json.dumps(result, ensure_ascii=False, indent=1)) if as_json else shown.show(result)
    return 1 if result["missing"] else 0


def ancestry(checkpoint: str, overrides: list[str] | None) -> "list[family.Ancestor]":
    """The lineage of the checkpoint that a user names. Raises CheckpointError."""
    from r1pipe.launch import parents
    from r1pipe.runs import lineage as family

    return list(family.ancestors(parents.resolve(checkpoint, family.SearchPath.of(composed(overrides)))))


def sync(
    overrides: Overrides = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Delete what MLflow has of these runs, and make it again.")
    ] = False,
) -> int:
    """Bring MLflow up to the run folders: sync root=DIR [pipeline=NAME]

    Exit code 1 if a run was left out because its config.json cannot be read.
    """
    from r1pipe import tracking
    from r1pipe.launch import run_plan
    from r1pipe.runs import lineage as family

    config = composed(overrides)
    if not family.run_folders(Path(config.root)):
        raise EnvironmentProblem(f"no runs under {config.root}; give root=DIR")
    written, busy = tracking.sync(config.root, pipeline_in(overrides), config.tracking.uri, rebuild)
    print(f"MLflow has {written} runs of {config.root}, wholly")
    for run_id in busy:
        print(f"left to the process that is mirroring it: {run_id}")
    broken = run_plan.unreadable(Path(config.root))
    for run in broken:
        print(f"warning: {run_plan.unreadable_message(run)}", file=sys.stderr)
    return 1 if broken else 0


def prune(
    runs: Annotated[
        list[str] | None, typer.Argument(metavar="[RUNS] [OVERRIDES]...", help="run ids or stages")
    ] = None,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="runs that have not finished")] = False,
    older_than: Annotated[
        float | None, typer.Option(min=0, metavar="DAYS", help="runs that nothing has written to since")
    ] = None,
    keep_last: Annotated[
        int | None, typer.Option(min=0, metavar="N", help="all but the newest N of each stage and seed")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Remove them; without it they are listed only.")] = False,
) -> None:
    """Remove runs: prune grpo --keep-last 2

    Several conditions must all hold. A run stays while it is running, and while a run that stays was made
    from it (weights or data). MLflow keeps its rows until `r1pipe sync --rebuild`.
    """
    from r1pipe.cli import prune as pruning

    names, overrides = split(runs)
    root = Path(composed(overrides).root)
    selection = pruning.Selection(names, pipeline_in(overrides), unfinished, older_than, keep_last)
    print(*pruning.prune(root, selection, remove=yes), sep="\n")


def ui(
    overrides: Overrides = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="where it listens")] = 5000,
    host: Annotated[str, typer.Option(help="this machine alone can reach 127.0.0.1")] = "127.0.0.1",
) -> int:
    """Open MLflow's pages of all runs."""
    from r1pipe.tracking import serve_ui

    config = composed(overrides)
    return serve_ui(config.root, config.tracking, port, host)
