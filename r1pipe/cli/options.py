"""What several commands share: their arguments with help and completion, and reading overrides."""

import os
import re
from pathlib import Path
from typing import Annotated

import typer

from r1pipe.config import STAGE_TYPES, RunConfig
from r1pipe.config.describe import leaves
from r1pipe.config.groups import GROUPS, options


def complete_override(context: typer.Context, args: list[str], incomplete: str) -> list[str]:
    """`stage=<TAB>`, `sta<TAB>`, `stage.opt<TAB>`. Bash gives `stage=gr` as `stage`, `=`, `gr`."""
    key, equals, part = incomplete.rpartition("=")
    typed = f"{key}{equals}"
    in_bash = os.environ.get("COMP_WORDS", "").split()
    if not key and "=" in in_bash[-2:]:
        key, equals, typed = in_bash[in_bash.index("=", -2) - 1], "=", ""
    if not equals:
        return sorted({f"{name}=" for name in [*GROUPS, *leaves()] if name.startswith(incomplete)})
    return [f"{typed}{name}" for name in options(key) if name.startswith(part)] if key in GROUPS else []


def complete_run(context: typer.Context, args: list[str], incomplete: str) -> list[str]:
    """Stage names and the run ids under ./runs."""
    found = [path.parent.name for path in Path("runs").glob("*/record.json")]
    return sorted(name for name in [*STAGE_TYPES, *found] if name.startswith(incomplete))


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[OVERRIDES]...", help="key=value ...", autocompletion=complete_override),
]
Checkpoint = Annotated[
    str,
    typer.Argument(
        metavar="CHECKPOINT",
        help="run id, path, stage name or models:/name@alias",
        autocompletion=complete_run,
    ),
]


def composed(overrides: list[str] | None) -> RunConfig:
    from r1pipe.config.compose import compose  # Hydra is imported when overrides are read

    return compose(overrides or []).config


def split(words: list[str] | None) -> tuple[list[str], list[str]]:
    """Other words, and overrides: those that begin with a key of the config and `=`."""
    from r1pipe.config.overrides import TOP_KEYS

    given = words or []
    overrides = [word for word in given if "=" in word and re.split(r"[.=]", word)[0] in TOP_KEYS]
    return [word for word in given if word not in overrides], overrides


def pipeline_in(overrides: list[str] | None) -> str | None:
    """The pipeline that the overrides name; None for all."""
    keys = {line.partition("=")[0] for line in overrides or []}
    return composed(overrides).pipeline if keys & {"pipeline", "recipe", "seed"} else None
