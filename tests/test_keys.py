"""Every key that a message or a docstring names exists: a remedy that cannot be typed is none."""

import ast
import dataclasses
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest

import r1pipe
from r1pipe.config import DistillConfig, RunConfig
from r1pipe.config.compose import compose
from r1pipe.config.run import STAGE_TYPES
from r1pipe.config.serving import ServeConfig
from r1pipe.config.transfer import as_rl, in_distillation
from r1pipe.core.errors import SamplerLost
from r1pipe.train.distill.on_policy import naming_its_keys
from r1pipe.train.rl.tripwires import WIRES, Tripwires

GROUPS = ("stage", "engine", "sampler", "tracking", "benchmark", "serve")
HOLE = "\0"  # where a message has a value
KEY = re.compile(rf"(?<![\w./{HOLE}-])({'|'.join(GROUPS)})((?:\.[a-z_0-9]+)+)({HOLE}?)(?![\w(/])")
FILES = (".py", ".json", ".jsonl", ".opt")  # of other things: serve.py, stage.opt in an example of completion
RENAMED = Path(r1pipe.__file__).parent / "config" / "fields.py"  # has the table of old names
SOURCES = sorted({*Path(r1pipe.__file__).parent.rglob("*.py")} - {RENAMED})


def below(kind: Any, place: str) -> Iterator[str]:
    """The keys below a place whose value is of this type; * where names are free."""
    if dataclasses.is_dataclass(kind):
        for name, hint in get_type_hints(kind).items():
            yield f"{place}.{name}"
            yield from below(hint, f"{place}.{name}")
    elif get_origin(kind) is dict:
        yield f"{place}.*"
        yield from below(get_args(kind)[1], f"{place}.*")
    else:
        for part in get_args(kind):
            yield from below(part, place)


@cache
def keys() -> frozenset[str]:
    types = [*get_type_hints(RunConfig).items(), ("serve", ServeConfig)]
    types += [("stage", kind) for kind in STAGE_TYPES.values()]
    return frozenset(key for name, kind in types for key in below(kind, name))


def exists(key: str) -> bool:
    places = {key.partition(".")[0]}
    for part in key.split(".")[1:]:
        places = {f"{place}.{name}" for place in places for name in (part, "*")} & keys()
    return bool(places)


def texts(source: str) -> Iterator[str]:
    """The texts in Python code, values that are put into them as holes."""
    parts = set()
    for node in ast.walk(ast.parse(source)):  # a whole comes before its parts
        if isinstance(node, ast.JoinedStr):
            parts |= {id(part) for part in node.values}
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.value


def named(text: str) -> Iterator[str]:
    """The keys in a text; of one that ends in a value, what comes before."""
    for group, rest, hole in KEY.findall(text):
        key = f"{group}{rest}".rpartition(".")[0] if hole else f"{group}{rest}"
        if "." in key and not key.endswith(FILES):
            yield key


def test_every_key_that_is_named_exists() -> None:
    found = {(path, key) for path in SOURCES for text in texts(path.read_text()) for key in named(text)}
    assert len(found) > 300
    assert [(path.name, key) for path, key in sorted(found) if not exists(key)] == []
    assert [*named(f"lower stage.optim.l or stage.{HOLE}")] == ["stage.optim.l"] and not exists(
        "stage.optim.l"
    )


def test_in_a_distillation_tripwires_and_errors_name_its_own_keys() -> None:
    config = compose(
        ["stage=distill", "teacher=base", "stage.extract=distribution", "stage.transfer=rl"]
    ).config
    assert isinstance(config.stage, DistillConfig)
    wires = Tripwires(config.tripwires.wires, as_rl(config.stage), in_distillation)
    limits = {wire.measure: config.tripwires.wires[name].limit for name, wire in WIRES.items()}
    steps = [wires.check({"completions/clipped_ratio": limits["completions/clipped_ratio"] + 0.1})]
    [trip] = steps[0]
    assert "raise stage.rl.sampling.max_tokens or set stage.rl.rewards.truncation_penalty" in trip.message
    own = [in_distillation(wire.cause) for wire in WIRES.values()]
    assert any("stage.optim.lr" in cause for cause in own), "what every stage has stays where it is"
    assert not any(re.search(r"stage\.(kl_coef|rewards|sampling)", cause) for cause in own)
    told = r"lower stage\.rl\.kl_coef and stage\.optim\.lr"
    with pytest.raises(SamplerLost, match=told) as lost, naming_its_keys():
        raise SamplerLost("lower stage.kl_coef and stage.optim.lr", again=True)
    assert lost.value.again
