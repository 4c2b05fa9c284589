"""The config's keys, and what each means: the comments beside the fields of the schema."""

import ast
import dataclasses
import inspect
import io
import tokenize
from collections.abc import Iterator
from functools import cache
from typing import Any

from r1pipe.config.fields import field_types
from r1pipe.config.run import STAGE_TYPES, RunConfig


def leaves(cls: type = RunConfig, prefix: str = "") -> Iterator[str]:
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
    """Field name -> the comment beside it, or the string below it; of base classes too."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        source = inspect.getsource(base)
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        beside = {token.start[0]: token.string for token in tokens if token.type == tokenize.COMMENT}
        definition = ast.parse(source).body[0]
        assert isinstance(definition, ast.ClassDef)
        name = ""
        for node in definition.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                name = node.target.id
                span = range(node.lineno, (node.end_lineno or node.lineno) + 1)
                lines = [beside[line] for line in span if line in beside]
                if lines:
                    found[name] = " ".join(line.lstrip("# ") for line in lines)
            elif name and isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                found[name] = inspect.cleandoc(str(node.value.value))
    return found
