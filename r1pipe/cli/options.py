"""Words of the command line that several verbs share, with their help and completion."""

from typing import Annotated

import typer

from r1pipe.cli import completion
from r1pipe.config.script_options import Precision

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[OVERRIDES]...", help="key=value ...", autocompletion=completion.overrides),
]
Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="run id, path, stage name or models:/name@alias",
        autocompletion=completion.checkpoints,
    ),
]

Temperature = Annotated[float | None, typer.Option(help="0 is greedy; none: the checkpoint's own setting")]
TopP = Annotated[float | None, typer.Option(help="none: the checkpoint's own setting")]
MaxTokens = Annotated[int | None, typer.Option(help="longest answer; none: what the context leaves")]
Seed = Annotated[int, typer.Option(help="of the draws; the override seed= chooses the pipeline")]

Dtype = Annotated[Precision | None, typer.Option(help="fp8: blocks of 128 x 128; none: each tensor as it is")]
ShardGB = Annotated[float, typer.Option(help="largest file, in GB, and about as much memory")]

Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN",
        help="run id, path or stage name (its newest run)",
        autocompletion=completion.checkpoints,
    ),
]
Steps = Annotated[str | None, typer.Option(metavar="STEPS", help="7 or 10-20")]
Bounds = Annotated[
    list[str] | None,
    typer.Option(metavar="BOUND", help="'>=1', 0.5..1, accuracy=0; several: all must hold"),
]
Words = Annotated[
    str | None, typer.Option(metavar="WORDS", help="in the prompt or the answer; /a regular expression/")
]
Limit = Annotated[int, typer.Option(min=1, metavar="N", help="best, worst and odd ones, each")]
