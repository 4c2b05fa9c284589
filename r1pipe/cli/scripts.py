"""The commands that run a script of stages/ without DeepSpeed: answers, verdicts, weights out, weights in."""

import os
import shlex
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from r1pipe.cli.options import Checkpoint, Overrides, composed, split
from r1pipe.config import ParentRef, script_options
from r1pipe.config.fields import Strict
from r1pipe.config.script_options import (
    DataOptions,
    ExportOptions,
    GenerateOptions,
    ImportOptions,
    Precision,
    ScoreOptions,
)
from r1pipe.core.errors import ConfigError

Temperature = Annotated[float | None, typer.Option(help="0 is greedy; none: the checkpoint's own setting")]
TopP = Annotated[float | None, typer.Option(help="none: the checkpoint's own setting")]
MaxTokens = Annotated[int | None, typer.Option(help="longest answer; none: what the context leaves")]
Seed = Annotated[int, typer.Option(help="of the draws; the override seed= chooses the pipeline")]
Dtype = Annotated[Precision | None, typer.Option(help="fp8: blocks of 128 x 128; none: each tensor as it is")]
ShardGB = Annotated[float, typer.Option(help="largest file, in GB, and about as much memory")]
CpuSeconds = Annotated[float | None, typer.Option(help="code: processor time of each test")]
MemoryMB = Annotated[int | None, typer.Option(help="code: memory of a program")]
PartialCredit = Annotated[bool | None, typer.Option(help="code: the share of tests passed, not 1 or 0")]


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
    seed: Seed = 0,
) -> int:
    """Answer questions: generate grpo "Use 3, 5 and 7 to make 22."

    Overrides say where the checkpoint is: root=DIR, pipeline=NAME; chat.system=TEXT gives another system
    prompt than the checkpoint's own. Exit code 1 if some questions could not be
    answered, 2 if none could; each is named by its number.
    """
    words, overrides = split(questions)
    asked = []
    for word in words:  # as Python has decoded it, by the locale
        try:
            asked.append(os.fsencode(word).decode("utf-8"))
        except UnicodeError:
            raise ConfigError(f"{word!r} is not valid UTF-8; convert it") from None
    folder, system = _checkpoint(checkpoint, overrides), composed(overrides).chat.system
    options = GenerateOptions(folder, asked, False, as_json, temperature, top_p, max_tokens, seed, system)
    return _run("generate.py", options)


def chat(
    checkpoint: Checkpoint,
    overrides: Overrides = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_tokens: MaxTokens = None,
    seed: Seed = 0,
) -> int:
    """Ask a checkpoint question by question, until the input ends.

    Overrides say where the checkpoint is: root=DIR, pipeline=NAME; chat.system=TEXT gives another system
    prompt than the checkpoint's own.
    """
    folder, system = _checkpoint(checkpoint, overrides), composed(overrides).chat.system
    options = GenerateOptions(folder, [], True, False, temperature, top_p, max_tokens, seed, system)
    return _run("generate.py", options)


def score(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSONL: question, answer, completion")],
    reward: Annotated[str, typer.Option(help="accuracy, code, format, language, or a custom reward")],
    language: Annotated[str, typer.Option(help="of the questions; auto: as each is written")] = "en",
    strict: Annotated[bool, typer.Option("--strict", help="end at the first row that is refused")] = False,
    plugin: Annotated[
        list[str] | None, typer.Option(metavar="FILE.py", help="a Python file with custom rewards")
    ] = None,
    cpu_seconds: CpuSeconds = None,
    memory_mb: MemoryMB = None,
    partial_credit: PartialCredit = None,
) -> int:
    """Score a file's completions: score FILE --reward code (rows: prompt, tests, entry_point, completion)

    A custom reward needs `completion`; rows in a row with the same prompt and answer are a group.
    A row that cannot be scored has the status refused and is listed at the end with its line and the
    reason. Exit code 2 if that is every row.
    """
    programs = (cpu_seconds, memory_mb, partial_credit)
    return _run("score.py", ScoreOptions(file, reward, language, strict, plugin or [], *programs))


def data(
    file: Annotated[str, typer.Argument(metavar="FILE", help="file, folder, or OWNER/NAME on the hub")],
    overrides: Overrides = None,
    checkpoint: Annotated[str | None, typer.Option(help="whose template; none: the bundled one's")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="An object with everything, for scripts.")] = False,
) -> int:
    """Show what would be read from data: data FILE [data=NAME]

    Layout and columns, gold answers by form, rows set aside with the reason, claims to be another model and
    personal data, and five samples with the chat template. Nothing is written. Exit code 2 if no row can be
    used.
    """
    words = overrides or []
    chosen = [] if any(word.startswith("data=") for word in words) else ["data=files"]
    config = composed([*chosen, "data.path=FILE", *words])
    data = replace(config.data, path=file)  # no override: Hydra would read ${...} and backslashes in it
    folder = _checkpoint(checkpoint, [*chosen, *words]) if checkpoint else None
    options = DataOptions(data, folder, as_json, config.chat.system, config.screening)
    return _run("data.py", options)


def export(
    checkpoint: Checkpoint,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="made; must not hold anything yet")],
    overrides: Overrides = None,
    dtype: Dtype = None,
    shard_gb: ShardGB = 5.0,
) -> int:
    """Write a checkpoint for transformers and vLLM, read it back and compare: export grpo DIR

    A model card (README.md) and a data card (DATA_CARD.md) are filled from the records of its lineage.
    """
    from r1pipe.cli import cards
    from r1pipe.launch import parents
    from r1pipe.runs import lineage

    parent = parents.resolve(checkpoint, lineage.SearchPath.of(composed(overrides)))
    code = _run("export.py", ExportOptions(Path(parent.checkpoint), folder, dtype, shard_gb))
    if code == 0:
        cards.write(folder, list(lineage.ancestors(parent)))
        print(f"cards: {folder / cards.MODEL_CARD}, {folder / cards.DATA_CARD}")
    return code


def import_weights(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="published weights: safetensors, config.json")
    ],
    overrides: Overrides = None,
    name: Annotated[str | None, typer.Option(help="what to call it; none: as the folder is called")] = None,
    dtype: Dtype = None,
    shard_gb: ShardGB = 5.0,
) -> int:
    """Take in published weights, DeepSeek-V2 or V3 in shape: import DIR

    The checkpoint goes to ROOT/imported/NAME, which `parent=imported/NAME` finds.
    """
    from r1pipe.core.paths import IMPORTED
    from r1pipe.runs import lineage

    name = name or folder.resolve().name
    if Path(name).name != name or name == "..":
        raise ConfigError(f"--name {name} must be a name, not a path")
    target = Path(composed(overrides).root, IMPORTED, name)
    code = _run("import_weights.py", ImportOptions(folder, target, dtype, shard_gb))
    if code == 0:
        shape = lineage.settings_of(lineage.checkpoint_of_folder(target), set())
        line = ["r1pipe", "run", "stage=cold_start", f"parent={IMPORTED}/{name}", *shape, *(overrides or [])]
        print(f"next: {shlex.join(line)}")
    return code


def _checkpoint(name: str, overrides: list[str] | None) -> Path:
    return Path(resolved(name, overrides).checkpoint)


def resolved(name: str, overrides: list[str] | None) -> ParentRef:
    """The checkpoint that CHECKPOINT names, where overrides say that it is. Raises CheckpointError."""
    from r1pipe.launch import parents
    from r1pipe.runs.lineage import SearchPath

    return parents.resolve(name, SearchPath.of(composed(overrides)))


def _run(script: str, options: Strict) -> int:
    """Run a script on this terminal; its exit code. Raises ConfigError for an option that it would refuse."""
    from r1pipe.launch import command as launch

    with tempfile.TemporaryDirectory(prefix="r1pipe-") as folder:
        path = Path(folder, "options.json")
        script_options.write(options, path)
        return launch.script(script, [str(path)])
