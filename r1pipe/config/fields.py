"""What config classes are made of: bounded numbers, exact types, and rules across fields.

A config class is a dataclass that inherits from Strict. Its bounds stand at its fields; what must hold across
fields stands in a function of rules beside it.
"""

import json
import typing
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cache
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from r1pipe.core.errors import ConfigError, nearest

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0)]
AboveZero = Annotated[float, Field(gt=0)]
Discount = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]

Rules = Iterator[str]  # a message for each rule that does not hold
T = TypeVar("T")

RENAMED = {  # keys of earlier versions -> what they are called now
    "stage.rewards.unfinished": "stage.rewards.truncation_penalty",
    "stage.loss_mean": "stage.loss_aggregation",
    "stage.micro_tokens": "stage.max_tokens_per_micro_batch",
    "stage.sampling.slots": "stage.sampling.max_num_seqs",
    "stage.eval.slots": "stage.eval.max_num_seqs",
    "stage.compare_routes": "stage.routing_check_samples",
    "stage.dynamic_batches": "stage.max_sampling_batches",
    "stage.traces": "stage.demonstrations",
    "stage.surrogate=weighted": "stage.surrogate=cispo",
}
NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}
EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list [...]",
    "dict_type": "a mapping {name: value}",
}
BOUNDS = {"ge": "{:g} or more", "gt": "above {:g}", "le": "from 0 to {:g}", "lt": "0 or more and below {:g}"}


class Strict:
    """Exact types (an integer may stand for a float), no unknown keys, no infinities."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


_checks = cache(TypeAdapter)  # of a config class; made once, since that takes milliseconds


def build(cls: type[T], mapping: Any, where: str = "") -> T:
    """`mapping` as the config class `cls`. `where` is its dotted place in the config, for messages.

    Raises ConfigError naming the first wrong key: unknown, missing, of another type, out of bounds.
    """
    try:
        # as JSON: only there may a mapping stand for a dataclass although types are exact
        return _checks(typing.cast(Any, cls)).validate_json(json.dumps(mapping, default=str))
    except ValidationError as error:
        problems = error.errors(include_url=False)
    order = {"unexpected_keyword_argument": 0, "missing": 1}
    raise ConfigError(_explained(cls, min(problems, key=lambda p: order.get(p["type"], 2)), where)) from None


def _explained(cls: type, problem: Mapping[str, Any], where: str) -> str:
    """One of pydantic's errors as a line that names the key and what it must be."""
    kind, value, bounds = problem["type"], problem["input"], problem.get("ctx", {})
    key = where
    for part in problem["loc"]:
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else str(part)
    match kind:
        case "unexpected_keyword_argument":
            return unknown_key(key, str(problem["loc"][-1]), _names_at(cls, problem["loc"][:-1]))
        case "missing":
            return f"{key} is missing; give {key}=VALUE"
        case "dataclass_type" | "dataclass_exact_type":
            return f"{key}={shown(value)} is not a group of values; see `r1pipe config`"
        case "value_error":
            return str(bounds["error"])
        case "greater_than_equal" | "greater_than" | "less_than_equal" | "less_than":
            [(bound, limit)] = bounds.items()
            return f"{key}={shown(value)} must be {BOUNDS[bound].format(limit)}"
        case "finite_number":
            return f"{key}={value} is not finite"
        case "literal_error":
            if renamed := RENAMED.get(f"{key}={value}"):
                return f"{key}={value} is now {renamed}"
            choices = bounds["expected"].replace("'", "").replace(" or ", ", ")
            return f"{key}={shown(value)} is none of {choices}"
    is_now = NAMES.get(type(value), "a list" if isinstance(value, list) else "a group of values")
    return f"{key}={shown(value)} is {is_now}, but must be {EXPECTED.get(kind, problem['msg'])}"


def _names_at(cls: type, path: tuple[Any, ...]) -> list[str]:
    """The field names of the config class at `path` below `cls`."""
    for part in path:
        hint = field_types(cls).get(part)
        options = [hint, *typing.get_args(hint)]
        cls = next((option for option in options if hasattr(option, "__dataclass_fields__")), cls)
    return list(field_types(cls))


def unknown_key(key: str, name: str, known: typing.Iterable[str]) -> str:
    """The message for a key that the config does not have; `name` is compared with those `known`."""
    if key in RENAMED:
        return f"{key} is no key of the config; it is now {RENAMED[key]}"
    return f"{key} is no key of the config; {nearest(name, known)}"


@cache
def field_types(cls: type) -> dict[str, Any]:
    """Field name -> type of a config class, without its bounds."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def shown(value: Any) -> str:
    """A value as a user would write it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def check_all(rules: Rules) -> None:
    """Raises ConfigError, one line that names the key, on the first rule that does not hold."""
    for message in rules:
        raise ConfigError(message)
