"""What the shell offers: overrides from conf/ and the schema, checkpoints from ./runs."""

import os
from pathlib import Path

import typer

from r1pipe.config import STAGE_TYPES
from r1pipe.config.describe import leaves
from r1pipe.config.groups import GROUPS, options


def overrides(context: typer.Context, args: list[str], incomplete: str) -> list[str]:
    """`stage=<TAB>`, `sta<TAB>`, `stage.opt<TAB>`. Bash gives `stage=gr` as `stage`, `=`, `gr`."""
    key, equals, part = incomplete.rpartition("=")
    in_bash = os.environ.get("COMP_WORDS", "").split()
    if not key and "=" in in_bash[-2:]:
        key = in_bash[in_bash.index("=", -2) - 1]
        return [name for name in options(key) if name.startswith(part)] if key in GROUPS else []
    if equals:
        return [f"{key}={name}" for name in options(key) if name.startswith(part)] if key in GROUPS else []
    return sorted({f"{name}=" for name in [*GROUPS, *leaves()] if name.startswith(incomplete)})


def checkpoints(context: typer.Context, args: list[str], incomplete: str) -> list[str]:
    """Stage names and the run ids under ./runs."""
    found = [path.parent.name for path in Path("runs").glob("*/record.json")]
    return sorted(name for name in [*STAGE_TYPES, *found] if name.startswith(incomplete))
