"""The overrides of a command line in Hydra's syntax, and what is said of those that cannot be used."""

import difflib
import os
import re
from dataclasses import replace
from functools import cache
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException

from r1pipe.config.benchmark import LM_EVAL
from r1pipe.config.describe import leaves, open_mappings
from r1pipe.config.fields import field_types, unknown_key
from r1pipe.config.groups import upwards
from r1pipe.config.run import RunConfig
from r1pipe.core.errors import ConfigError, nearest

FILLED_AT_LAUNCH: dict[str, Any] = {
    "weights_from": None,
    "reads_from": {},
    "teacher_from": None,
    "judge_from": None,
}
TOP_KEYS = field_types(RunConfig).keys() - FILLED_AT_LAUNCH.keys()
# The keys below these exist with another key's value only.
ONLY_WITH = {
    "stage.ppo": "stage.algorithm=ppo",
    **{f"stage.{name}": f"stage.transfer={name}" for name in ("divergence", "rl", "ranking")},
}
JUDGE = "stage.judge"  # the keys below it exist with judge=MODEL only
LORA = "model.lora"  # with model=hf only


def parse(overrides: list[str]) -> list[Override]:
    """Hydra's reading of the overrides, sweeps included; `precision=` and `kernels=` are the engine's.

    Raises ConfigError.
    """
    for line in overrides:
        if "=" not in line and not line.startswith("~"):
            raise ConfigError(f"'{line}' is no override; write key=value, +key=value or ~key")
    lines = [re.sub("^(?=(precision|kernels)=)", "engine.", line) for line in overrides]
    parsed = [parse_one(part) for line in lines for part in task_apart(line)]
    for override in parsed:
        key = str(override.key_or_group)
        if key.partition(".")[0] in TOP_KEYS:
            continue
        below = {name for name in leaves() if "." in name}
        same = sorted(name for name in below if name.endswith(f".{key}"))  # `lr` is short for stage.optim.lr
        if not same:
            last_parts = {name.rpartition(".")[2] for name in below} - TOP_KEYS
            similar = difflib.get_close_matches(key, [*TOP_KEYS, *last_parts], n=1, cutoff=0.75)
            same = sorted(name for name in below if name.rpartition(".")[2] in similar)
        remedy = f"did you mean {' or '.join(same)}?" if same else nearest(key, TOP_KEYS)
        raise ConfigError(f"{key} is no key of the config; {remedy}")
    return parsed


def task_apart(line: str) -> list[str]:
    """benchmark=lm_eval/TASK as the overrides that it stands for; another line as it is."""
    name = line.removeprefix("benchmark=")
    if name == line or not name.startswith(LM_EVAL):
        return [line]
    return [f"benchmark={LM_EVAL.rstrip('/')}", f"benchmark.name='{name}'"]


def parse_one(line: str) -> Override:
    """One override. A value that Hydra's grammar cannot read (a path with `=`, `#`, `~` or `é`) is taken as a
    string, as if it stood in quotes. Raises ConfigError."""
    key, equals, value = line.partition("=")
    if key == "root":
        value = os.path.expanduser(value)  # the shell leaves a `~` after `=` as it is
    readings = [f"{key}{equals}{value}"]
    if equals and not value.startswith(("[", "{", "'", '"')):
        quoted = value.replace("'", r"\'")
        readings.append(f"{key}='{quoted}'")
    problem = ""
    for reading in readings:
        try:
            return read_by_hydra(reading)
        except HydraException as error:
            problem = first_line(error)
    raise ConfigError(f"cannot read {line}: {problem}; write a string as key=\"'...'\"")


@cache
def read_by_hydra(line: str) -> Override:
    """One override as Hydra's grammar has it; a recipe composes many configs from the same words."""
    return OverridesParser.create().parse_overrides([line])[0]


def addable(override: Override) -> Override:
    """The override with `++` where it may add keys: +key=value sets a key that exists, too, and a mapping may
    bring new names, as in stage.rewards.weights={my_reward: 1}, and have them."""
    is_open = override.key_or_group.rpartition(".")[0] in open_mappings()
    adds = override.is_add() or (not override.is_delete() and (is_open or isinstance(override.value(), dict)))
    return replace(override, type=OverrideType.FORCE_ADD) if adds else override


def explained(error: Exception, own: list[Override], known: set[str]) -> str:
    """What Hydra's complaint means: which key is unknown, and the nearest known one."""
    for override in own:
        key = override.key_or_group
        if override.is_add() or override.is_force_add() or key in known:
            continue
        own_keys = {name for name in known if not name.startswith("recipe.")}
        same_name = [name for name in own_keys if name.rpartition(".")[2] == key.rpartition(".")[2]]
        above = next(part for part in upwards(key) if part in known)
        beside = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == above]
        if above in ONLY_WITH and not beside:
            return f"{key} needs {ONLY_WITH[above]}"
        if above == JUDGE and not beside:
            return f"{key} needs judge=MODEL"
        if LORA in upwards(key) and LORA not in known:
            return f"{key} needs model=hf: adapters are for models of transformers"
        if same_name:
            return unknown_key(key, key, same_name)
        # compared without what all of them begin with: it makes any two similar
        wrong = key.removeprefix(f"{above}.").partition(".")[0]
        similar = [f"{above}.{name}" for name in difflib.get_close_matches(wrong, beside, n=1)]
        if similar:
            return unknown_key(key, similar[0], similar)
        return unknown_key(key, wrong, beside or [above])
    return first_line(error)


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
