"""The config's keys, and what each means: the comments beside the fields of the schema."""

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterator
from functools import cache
from typing import Any

from r1pipe.config.fields import field_types
from r1pipe.config.run import STAGE_TYPES, RunConfig

FILLED = ("weights_from", "reads_from", "teacher_from", "judge_from")  # at launch


def leaves() -> Iterator[str]:
    """Dotted names of the config's plain values; those of every kind of stage under `stage`."""
    return (name for name, _ in _typed_leaves(RunConfig, ""))


@cache
def open_mappings() -> set[str]:
    """Dotted names of the mappings that take any key, as stage.rewards.weights does."""
    return {name for name, hint in _typed_leaves(RunConfig, "") if typing.get_origin(hint) is dict}


def _typed_leaves(cls: type, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, hint in field_types(cls).items():
        if prefix == "stage." and name in ("script", "starts_from", "reads"):
            continue  # structure, not settings
        if name == "stage":
            for kind in set(STAGE_TYPES.values()):
                yield from _typed_leaves(kind, "stage.")
        elif dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from _typed_leaves(hint, f"{prefix}{name}.")
        elif name not in (*FILLED, "name"):
            yield f"{prefix}{name}", hint


def descriptions(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, sentence) of every field of a config, group or leaf, that has one."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from descriptions(inner, f"{prefix}{key}.")
    elif dataclasses.is_dataclass(value):
        kind: type = type(value)
        documented = comments(kind)
        for field in dataclasses.fields(value):
            if field.name in documented:
                yield f"{prefix}{field.name}", documented[field.name]
            yield from descriptions(getattr(value, field.name), f"{prefix}{field.name}.")


@cache
def comments(cls: type) -> dict[str, str]:
    """Field name -> the comment beside it; of base classes too."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        found |= re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(base), re.MULTILINE)
    return found
