"""Plain mappings to the schema's dataclasses and back, strictly: what is wrong is named by its key."""

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from r1pipe.config.schema import STAGE_TYPES, RunConfig, StageConfig
from r1pipe.core.errors import ConfigError, nearest

T = TypeVar("T")


def load(mapping: Mapping[str, Any]) -> RunConfig:
    """A resolved mapping as RunConfig. Raises ConfigError naming the wrong, missing or unknown key."""
    return build(RunConfig, mapping, "")


def read_config(path: Path | str) -> RunConfig:
    """The RunConfig of a run folder's config.json. Raises ConfigError."""
    try:
        mapping = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; give the folder of a run") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno} is not JSON: {error.msg}") from None
    except (ValueError, RecursionError, OSError) as error:
        raise ConfigError(f"{path} cannot be read: {str(error) or type(error).__name__}") from None
    return load(mapping)


def to_mapping(config: RunConfig) -> dict[str, Any]:
    return asdict(config)


def build(cls: type[T], mapping: Any, where: str) -> T:
    """`mapping` as the dataclass `cls`; `where` is its dotted place, for messages. Raises ConfigError."""
    if not isinstance(mapping, Mapping):
        raise ConfigError(f"{where}={shown(mapping)} is not a group of values; see `r1pipe config`")
    if cls is StageConfig:
        cls = typing.cast(type[T], stage_type(mapping.get("name")))
    hints = field_types(typing.cast(type, cls))
    for key in mapping:
        if key not in hints:
            raise ConfigError(f"{join(where, key)} is no key of the config; {nearest(str(key), hints)}")
    missing = [key for key in hints if key not in mapping]
    if missing:
        raise ConfigError(f"{join(where, missing[0])} is missing; give {join(where, missing[0])}=VALUE")
    return cls(**{key: convert(mapping[key], hint, join(where, key)) for key, hint in hints.items()})


@cache
def field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def stage_type(name: Any) -> type[StageConfig]:
    if not isinstance(name, str) or name not in STAGE_TYPES:
        raise ConfigError(f"stage.name={shown(name)} is no stage; {nearest(str(name), STAGE_TYPES)}")
    return STAGE_TYPES[name]


def convert(value: Any, hint: Any, where: str) -> Any:
    """`value` checked against the type `hint`; the one widening is int to float. Raises ConfigError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # only `X | None` occurs
        inner = next(arg for arg in args if arg is not type(None))
        return None if value is None else convert(value, inner, where)
    if is_dataclass(hint):
        return build(typing.cast(type, hint), value, where)
    if origin is list and isinstance(value, list):
        return [convert(item, args[0], f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, Mapping):
        return {str(key): convert(item, args[1], join(where, key)) for key, item in value.items()}
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:  # exact: a bool is an int to isinstance
        raise ConfigError(f"{where}={shown(value)} is {kind(value)}, but must be {expected(hint)}")
    return value


def join(where: str, key: Any) -> str:
    return f"{where}.{key}" if where else str(key)


def shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}


def kind(value: Any) -> str:
    return KINDS.get(type(value), "a list" if isinstance(value, list) else "a group of values")


def expected(hint: Any) -> str:
    if typing.get_origin(hint) is list:
        return f"a list [...] in which each is {expected(typing.get_args(hint)[0])}"
    if typing.get_origin(hint) is dict:
        return "a mapping {name: value}"
    return "a group of values" if is_dataclass(hint) else KINDS[hint]
