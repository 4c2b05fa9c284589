"""Words of the command line that several verbs share, with their help and completion."""

from typing import Annotated, Literal

import typer

from r1pipe import completion

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

Precision = Literal["float32", "bfloat16", "fp8"]  # the keys of model.weights.PRECISIONS, which needs torch
Dtype = Annotated[Precision | None, typer.Option(help="fp8: blocks of 128 x 128; none: each tensor as it is")]
ShardGB = Annotated[float, typer.Option(help="largest file, in GB, and about as much memory")]
