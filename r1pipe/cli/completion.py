"""What the shell offers: overrides from conf/ and the schema, checkpoints from ./runs."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import typer

from r1pipe.config.groups import GROUPS, options
from r1pipe.config.schema import STAGE_TYPES, RunConfig
from r1pipe.config.typed import field_types


def overrides(context: typer.Context, args: list[str], incomplete: str) -> list[str]:
    """`stage=<TAB>`, `sta<TAB>`, `stage.opt<TAB>`. Bash gives `stage=gr` as `stage`, `=`, `gr`."""
    key, equals, part = incomplete.rpartition("=")
    in_bash = os.environ.get("COMP_WORDS", "").split()
    if not key and "=" in in_bash[-2:]:
        key = in_bash[in_bash.index("=", -2) - 1]
        return [name for name in options(key) if name.startswith(part)] if key in GROUPS else []
    if equals:
        return [f"{key}={name}" for name in options(key) if name.startswith(part)] if key in GROUPS else []
    return sorted({f"{name}=" for name in [*GROUPS, *leaves(RunConfig, "")] if name.startswith(incomplete)})


def leaves(cls: type, prefix: str) -> Iterator[str]:
    """Dotted names of a config class's plain values; those of every kind of stage under `stage`."""
    for name, hint in field_types(cls).items():
        if prefix == "stage." and name in ("script", "starts_from", "reads"):
            continue  # structure, not settings
        if name == "stage":
            for kind in set(STAGE_TYPES.values()):
                yield from leaves(kind, "stage.")
        elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from leaves(hint, f"{prefix}{name}.")
        elif name not in ("weights_from", "reads_from", "name"):
            yield f"{prefix}{name}"


def checkpoints(context: typer.Context, args: list[str], incomplete: str) -> list[str]:
    """Stage names and the run ids under ./runs."""
    found = [path.parent.name for path in Path("runs").glob("*/record.json")]
    return sorted(name for name in [*STAGE_TYPES, *found] if name.startswith(incomplete))
