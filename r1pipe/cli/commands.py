"""The command line. Verbs import what they need when they run: `r1pipe --help` answers at once.

Every error that a user can cause ends here, as one line and exit code 2.
"""

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from r1pipe.cli import verbs
from r1pipe.cli.options import Checkpoint, Dtype, MaxTokens, Overrides, ShardGB, Temperature, TopP
from r1pipe.cli.overrides import composed, split
from r1pipe.core.errors import R1pipeError
from r1pipe.core.redaction import without_secrets
from r1pipe.runs import stopping

if TYPE_CHECKING:
    from r1pipe.config.schema import RunConfig

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="DeepSeek-R1's recipe as a pipeline of DeepSpeed jobs, each handed to the next with its lineage.",
    epilog="OVERRIDES are Hydra's, everywhere: group=option (stage, recipe, model, data, engine, tracking, "
    "tripwires), key=value, +key=value, ~key. CHECKPOINT: a run id, a path, a stage name (its newest "
    "finished run), or models:/name@alias.",
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
) -> int:
    """Run one stage as one DeepSpeed job: run stage=grpo

    An unfinished run goes on where it stopped, but not with a config that computes something else: that is
    refused with what differs. A finished run is left alone and a new one starts, unless a kill kept
    the command from saying that it is done.
    """
    from r1pipe.config.groups import with_stage
    from r1pipe.launch import pipeline

    config = composed(with_stage(overrides or []))
    if dry_run:
        print(pipeline.dry_run(config, fresh))
        return 0
    return run_to_end(config, fresh)


def run_to_end(config: "RunConfig", fresh: bool = False) -> int:
    """Run one stage and show its row of the table; the job's exit code."""
    from r1pipe.cli import compare
    from r1pipe.launch import pipeline
    from r1pipe.runs import lineage

    placed = pipeline.place(lineage.with_parents(config), fresh)
    code = pipeline.run_stage(placed)
    if placed.done:
        compare.show([compare.row(placed.run)])
        print(f"run folder: {placed.run.path}")
    return code


@app.command()
def doctor(
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="An object with all checks, for scripts.")] = False,
) -> int:
    """Look a stage over before it runs, in a minute: doctor stage=grpo

    Exit code 1 if a check failed: each is told with what was measured and the remedy.
    """
    from r1pipe.cli import doctor as examine
    from r1pipe.config.groups import with_stage

    return examine.doctor(with_stage(overrides or []), as_json)


@app.command()
def reproduce(overrides: Overrides = None) -> int:
    """Run a recipe's stages and controls: reproduce recipe=laptop

    Run it again and it goes on where it stopped; when all is done, it prints the table again.
    """
    from r1pipe.cli import compare
    from r1pipe.launch import pipeline

    outcome = pipeline.reproduce(overrides or [])
    compare.show([compare.row(run) for run in outcome.finished])
    if outcome.code == 0:
        pipeline.where_it_is(outcome)
    return outcome.code


@app.command(name="config")
def show_config(overrides: Overrides = None) -> None:
    """Print the whole resolved config, with where each value comes from: config stage=grpo"""
    from r1pipe.config import to_mapping
    from r1pipe.config.compose import compose
    from r1pipe.config.groups import flat
    from r1pipe.core.redaction import publishable

    found = compose(overrides or [])
    values = dict(flat(publishable(to_mapping(found.config))))
    shown = {key: f"{key}={json.dumps(values[key], ensure_ascii=False)}" for key in found.sources}
    width = min(60, max(map(len, shown.values())))
    for key, source in found.sources.items():
        print(f"{shown[key]:<{width}}  # {source}")


@app.command(name="eval")
def evaluate(checkpoint: Checkpoint, overrides: Overrides = None) -> int:
    """Evaluate any checkpoint on held-out problems: eval grpo stage.eval.problems=100"""
    from r1pipe.runs import lineage

    given = overrides or []
    parent = lineage.resolve(checkpoint, lineage.Place.of(composed(given)))
    taken = lineage.settings_of(parent, {line.partition("=")[0] for line in given})
    return run_to_end(composed([*taken, *given, "stage=evaluate", f"parent={json.dumps(parent.checkpoint)}"]))


@app.command()
def generate(
    checkpoint: Checkpoint,
    questions: Annotated[
        list[str] | None,
        typer.Argument(metavar="[QUESTIONS] [OVERRIDES]...", help="none: one per line of standard input"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per answer.")] = False,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_tokens: MaxTokens = None,
    seed: Annotated[int, typer.Option(help="of the draws; the override seed= chooses the pipeline")] = 0,
) -> int:
    """Answer questions: generate grpo "Use 3, 5 and 7 to make 22."

    Overrides say where the checkpoint is: root=DIR, pipeline=NAME.
    """
    from r1pipe.cli import scripts

    asked, overrides = split(questions or [])
    settings = {"--temperature": temperature, "--top-p": top_p, "--max-tokens": max_tokens, "--seed": seed}
    return scripts.answer(checkpoint, overrides, settings, ["--json"] if as_json else [], asked)


@app.command()
def chat(
    checkpoint: Checkpoint,
    overrides: Overrides = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_tokens: MaxTokens = None,
    seed: Annotated[int, typer.Option(help="of the draws; the override seed= chooses the pipeline")] = 0,
) -> int:
    """Ask a checkpoint question by question, until the input ends."""
    from r1pipe.cli import scripts

    settings = {"--temperature": temperature, "--top-p": top_p, "--max-tokens": max_tokens, "--seed": seed}
    return scripts.answer(checkpoint, overrides or [], settings, ["--chat"], [])


@app.command()
def score(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL: question, answer, completion")],
    reward: Annotated[Literal["accuracy", "code", "format", "language"], typer.Option(help="which rule")],
    language: Annotated[Literal["en", "zh"], typer.Option(help="of the questions")] = "en",
) -> int:
    """Score a file's completions: score FILE --reward code (rows: prompt, tests, entry_point, completion)"""
    from r1pipe.cli import scripts

    return scripts.score(file, reward, language)


@app.command()
def export(
    checkpoint: Checkpoint,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="made; must not hold anything yet")],
    overrides: Overrides = None,
    dtype: Dtype = None,
    shard_gb: ShardGB = 5.0,
) -> int:
    """Write a checkpoint for transformers and vLLM, read it back and compare: export grpo DIR"""
    from r1pipe.cli import scripts

    return scripts.export(checkpoint, folder, overrides or [], {"--dtype": dtype, "--shard-gb": shard_gb})


@app.command(name="import")
def import_weights(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="published weights: safetensors, config.json")
    ],
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="what to call it; none: as the folder is called")] = None,
    dtype: Dtype = None,
    shard_gb: ShardGB = 5.0,
) -> int:
    """Take in published weights, DeepSeek-V2 or V3 in shape: import DIR"""
    from r1pipe.cli import scripts

    return scripts.take_in(folder, name, overrides or [], {"--dtype": dtype, "--shard-gb": shard_gb})


for verb in (verbs.compare, verbs.report, verbs.samples, verbs.lineage, verbs.sync, verbs.ui):
    app.command()(verb)


def main() -> None:
    """Entry point: exit code 2 and one line for what a user got wrong."""
    try:
        with stopping.handling(stopping.leave, (signal.SIGTERM, signal.SIGHUP)):
            code = app(standalone_mode=False)
    except (R1pipeError, typer.TyperException) as error:
        message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        if message:  # empty where Typer has just printed the help
            print(f"r1pipe: {without_secrets(' '.join(message.split()))}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
