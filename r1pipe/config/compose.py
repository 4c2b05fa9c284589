"""Overrides -> one checked RunConfig: Hydra resolves conf/, a recipe's values go under the user's own.

The recipe chooses groups (`choose`) and values per stage (`every_stage`, `stage_values`). They are placed
before the command line's overrides, so the command line always wins. Where one of the two names a loss
(`stage.loss`) or an algorithm (`stage.algorithm`), the values of its file stand in front of all that the same
one gives: over whatever is below, the algorithm's over the loss's.
"""

import difflib
import json
import os
import re
from dataclasses import dataclass
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from r1pipe.config.data import refuse_unused_row_keys
from r1pipe.config.describe import leaves
from r1pipe.config.fields import field_types, unknown_key
from r1pipe.config.groups import GROUPS, defined_in, flat, options, read, upwards
from r1pipe.config.rl import RLConfig
from r1pipe.config.run import STAGE_TYPES, RunConfig, check, load
from r1pipe.core.errors import ConfigError, nearest
from r1pipe.core.paths import conf_dir

COMMAND_LINE = "command line"
RECIPE_ONLY = ("choose", "every_stage", "stage_values")  # used up here; a job's config holds the outcome
FILLED_AT_LAUNCH: dict[str, Any] = {"weights_from": None, "reads_from": {}}
NAMED = ("loss", "algorithm")  # what `stage.loss=NAME` takes is a file in conf/stage/part/loss, and so on
PPO = "stage.ppo"  # the keys below it are there with stage.algorithm=ppo alone
TOP_KEYS = field_types(RunConfig).keys() - FILLED_AT_LAUNCH.keys()


@dataclass(frozen=True)
class Composed:
    """A config, and for every dotted key the file that gave its value, or COMMAND_LINE."""

    config: RunConfig
    sources: dict[str, str]


def compose(overrides: list[str]) -> Composed:
    """The config that `overrides` (Hydra's syntax) describe. Raises ConfigError, one line."""
    given = parse(spelled_out(overrides))
    for override in given:
        if override.is_sweep_override():
            raise ConfigError(
                f"'{override.input_line}' gives several values; `r1pipe run --multirun` runs each; write "
                "a list as [a,b], a text as 'a,b'"
            )
    choices = choose(given)
    values = layered(given, choices)
    below = [f"{group}={option}" for group, option in choices.items()]
    below += [f"++{key}={json.dumps(value, ensure_ascii=False)}" for key, (value, _) in values.items()]
    own = [override for override in given if override.key_or_group not in GROUPS]
    mapping = resolve(below, own)
    for key in RECIPE_ONLY:
        mapping["recipe"].pop(key)
    config = load({**mapping, **FILLED_AT_LAUNCH})
    check(config)
    refuse_unused_row_keys({override.key_or_group for override in own}, config.data)
    files = {key: file for key, (_, file) in values.items()}
    return Composed(config, sources_of(mapping, choices, files, own))


def spelled_out(overrides: list[str]) -> list[str]:
    """The switches `precision=...` and `kernels=...` as the engine's keys.

    With a precision below float32 comes the lowest ZeRO level that keeps float32 masters, where the engine's
    file has none and nobody gave another.
    """
    given = [re.sub(r"^(?=(precision|kernels)=)", "engine.", line) for line in overrides]
    wanted = {line.partition("=")[2] for line in given if line.startswith("engine.precision=")}
    levels = [line for line in given if line.startswith("engine.zero_level=")]
    if given != overrides and wanted & {"bf16", "fp8"} and not levels:
        engine = choose(parse(given))["engine"]
        if read(f"engine/{engine}")["zero_level"] == 0:
            given.append("engine.zero_level=1")
    return given


def parse(overrides: list[str]) -> list[Override]:
    """Hydra's reading of the overrides. Raises ConfigError on what is no override."""
    for line in overrides:
        if "=" not in line and not line.startswith("~"):
            raise ConfigError(f"'{line}' is no override; write key=value, +key=value or ~key")
    parsed = [parse_one(line) for line in overrides]
    for override in parsed:
        key = str(override.key_or_group)
        if key.partition(".")[0] not in TOP_KEYS:
            raise ConfigError(f"{key} is no key of the config; {meant(key)}")
    return parsed


def meant(key: str) -> str:
    """The remedy for a key whose first part is unknown: `lr` is short for stage.optim.lr."""
    below = {name for name in leaves() if "." in name}
    same = sorted(name for name in below if name.endswith(f".{key}"))
    if not same:
        last_parts = {name.rpartition(".")[2] for name in below} - TOP_KEYS
        similar = difflib.get_close_matches(key, [*TOP_KEYS, *last_parts], n=1, cutoff=0.75)
        same = sorted(name for name in below if name.rpartition(".")[2] in similar)
    return f"did you mean {' or '.join(same)}?" if same else nearest(key, TOP_KEYS)


def parse_one(line: str) -> Override:
    """One override. A value that Hydra's grammar cannot read as it is (a path with `=`, `#`, `~` or `é`) is
    taken as a text, as if it stood in quotes. Raises ConfigError."""
    parser = OverridesParser.create()
    key, equals, value = line.partition("=")
    text = os.path.expanduser(value) if key == "root" else value  # the shell leaves a `~` after `=` as it is
    try:
        return parser.parse_overrides([f"{key}{equals}{text}"])[0]
    except HydraException as error:
        if not equals or text.startswith(("[", "{", "'", '"')):
            raise ConfigError(
                f"cannot read {line}: {first_line(error)}; write a text as key=\"'...'\""
            ) from None
    quoted = text.replace("'", r"\'")
    try:
        return parser.parse_overrides([f"{key}='{quoted}'"])[0]
    except HydraException as error:
        raise ConfigError(f"cannot read {line}: {first_line(error)}") from None


def choose(given: list[Override]) -> dict[str, str]:
    """Each group's option: the user's, else the recipe's, else conf/config.yaml's. Raises ConfigError."""
    own: dict[str, str] = {}
    for override in given:
        group = override.key_or_group
        if group in GROUPS:
            option = str(override.value())
            if override.is_delete() or option not in options(group):
                raise ConfigError(
                    f"{override.input_line}: no such {group}; {nearest(option, options(group))}"
                )
            own[group] = option
    defaults: dict[str, str] = {}
    for item in read("config")["defaults"]:
        defaults |= {} if item == "_self_" else item
    recipe = own.get("recipe", defaults["recipe"])
    return defaults | read(f"recipe/{recipe}")["choose"] | own


def recipe_values(recipe: str, stage: str) -> dict[str, Any]:
    """What the recipe says about the stage: dotted key -> value."""
    content = read(f"recipe/{recipe}")
    values = dict(flat(content["every_stage"], "stage")) if content["every_stage"] else {}
    return values | (dict(flat(own, "stage")) if (own := content["stage_values"].get(stage)) else {})


def layered(given: list[Override], choices: dict[str, str]) -> dict[str, tuple[Any, str]]:
    """What lies between the chosen groups and the command line: dotted key -> (value, file that gives it)."""
    recipe = recipe_values(choices["recipe"], choices["stage"])
    layers = [(recipe, f"conf/recipe/{choices['recipe']}.yaml")]
    if issubclass(STAGE_TYPES[choices["stage"]], RLConfig):
        below, above = [], []
        for kind in NAMED:
            key = f"stage.{kind}"
            named = [str(override.value()) for override in given if override.key_or_group == key]
            if named:
                above.append(named_values(kind, named[-1]))
            elif key in recipe:
                below.append(named_values(kind, recipe[key]))
        layers = [*below, *layers, *above]
    return {key: (value, file) for values, file in layers for key, value in values.items()}


def named_values(kind: str, name: str) -> tuple[dict[str, Any], str]:
    """The values that go by the name of a loss or an algorithm, and their file. Raises ConfigError."""
    folder = f"stage/part/{kind}"
    if name not in options(folder):
        raise ConfigError(f"stage.{kind}={name}: no such {kind}; {nearest(name, options(folder))}")
    return dict(flat(read(f"{folder}/{name}"), "stage")), f"conf/{folder}/{name}.yaml"


def resolve(below: list[str], own: list[Override]) -> dict[str, Any]:
    """conf/ with the overrides applied in order, interpolations filled in. Raises ConfigError."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        try:
            cfg = hydra_compose("config", below + [str(override.input_line) for override in own])
            return plain(OmegaConf.to_container(cfg, resolve=True))
        except (HydraException, OmegaConfBaseException) as error:
            known = plain(OmegaConf.to_container(hydra_compose("config", below), resolve=False))
            raise explained(error, own, {part for key, _ in flat(known) for part in upwards(key)}) from None


def explained(error: Exception, own: list[Override], known: set[str]) -> ConfigError:
    """What Hydra's complaint means: which key is unknown, and the nearest known one."""
    for override in own:
        key = override.key_or_group
        if override.is_add() or override.is_force_add() or key in known:
            continue
        same_name = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
        above = next(part for part in upwards(key) if part in known)
        beside = [name for name in known if name.rpartition(".")[0] == above]
        if above == PPO and not beside:
            return ConfigError(f"{key} needs stage.algorithm=ppo")
        return ConfigError(unknown_key(key, key, same_name or beside or [above]))
    return ConfigError(first_line(error))


def sources_of(
    mapping: dict[str, Any], choices: dict[str, str], between: dict[str, str], own: list[Override]
) -> dict[str, str]:
    """Dotted key -> the file that gave its value, or COMMAND_LINE."""
    files: dict[str, str] = {}
    for group, option in choices.items():
        files |= {f"{group}.{key}": file for key, file in defined_in(group, option).items()}
    files |= between  # what lies between groups and command line: dotted key -> file
    files |= {override.key_or_group: COMMAND_LINE for override in own}
    nearest_file = {}
    for key, _ in flat(mapping):
        nearest_file[key] = next((files[part] for part in upwards(key) if part in files), "conf/config.yaml")
    return nearest_file


def plain(container: Any) -> dict[str, Any]:
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
