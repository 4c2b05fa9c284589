"""Overrides -> one checked RunConfig: Hydra resolves conf/, a recipe's values go under the user's own.

The recipe chooses groups (`choose`), values (`values`) and those of stages (`every_stage`, `stage_values`).
They come before the command line's overrides, so the command line always wins. Where the recipe or the
command line names a loss (`stage.loss`), an algorithm (`stage.algorithm`) or a correction
(`stage.importance`), the values of its file come just before those of whoever named it, the algorithm's after
the loss's.
"""

import difflib
import json
import os
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from r1pipe.config.data import refuse_unused_row_keys
from r1pipe.config.describe import leaves, open_mappings
from r1pipe.config.fields import field_types, unknown_key
from r1pipe.config.groups import GROUPS, flat, options, read, upwards
from r1pipe.config.hf import NAME as HF
from r1pipe.config.hf import filled
from r1pipe.config.importance import KEYS, settled
from r1pipe.config.rl import RLConfig
from r1pipe.config.rules import check
from r1pipe.config.run import STAGE_TYPES, RunConfig, load
from r1pipe.config.stages import EvaluateConfig, RejectionConfig, RewardModelConfig
from r1pipe.core.errors import ConfigError, nearest
from r1pipe.core.paths import conf_dir

COMMAND_LINE = "command line"
RECIPE_ONLY = ("choose", "values", "every_stage", "stage_values")  # a job's config holds what comes of them
FILLED_AT_LAUNCH: dict[str, Any] = {
    "weights_from": None,
    "reads_from": {},
    "teacher_from": None,
    "judge_from": None,
}
NAMED = ("loss", "algorithm", "importance")  # `stage.loss=NAME`: a file in conf/stage/part/loss, and so on
NULL = "None"  # how Hydra reads the value null
PPO = "stage.ppo"  # the keys below it exist with stage.algorithm=ppo only
LORA = "model.lora"  # with model=hf only
JUDGE = "stage.judge"  # the keys below it exist with judge=MODEL only
JUDGE_PARTS: dict[type, tuple[str, ...]] = {  # what a stage adds to it: files of conf/stage/part/judge/
    EvaluateConfig: ("evaluator",),
    RejectionConfig: ("filter",),
    RewardModelConfig: ("labels",),
    RLConfig: (),
}
WITH_MASTERS = ("bf16", "fp8")  # precisions that need a ZeRO level which keeps float32 masters
TOP_KEYS = field_types(RunConfig).keys() - FILLED_AT_LAUNCH.keys()


@dataclass(frozen=True)
class Composed:
    """A config, and what tells where its values come from."""

    config: RunConfig
    keys: list[str]
    choices: dict[str, str]  # group -> option
    files: dict[str, str]  # dotted key -> source, for all that is placed above the groups

    @cached_property
    def sources(self) -> dict[str, str]:
        """For every dotted key the file that gave its value, or COMMAND_LINE."""
        files: dict[str, str] = {}
        options = [f"{group}={option}" for group, option in self.choices.items()]
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            defaults = loader.compute_defaults_list("config", options, RunMode.RUN).defaults
        for default in defaults:
            if not default.config_path.startswith("hydra/"):
                keys = [key for key, _ in flat(read(default.config_path))]
                files |= {f"{default.package}.{key}": f"conf/{default.config_path}.yaml" for key in keys}
        files |= self.files
        return {
            key: next((files[part] for part in upwards(key) if part in files), "conf/config.yaml")
            for key in self.keys
        }


def compose(overrides: list[str]) -> Composed:
    """The config that `overrides` (Hydra's syntax) describe. Raises ConfigError, one line."""
    parsed = parse(overrides)
    for override in parsed:
        if override.is_sweep_override():
            raise ConfigError(
                f"'{override.input_line}' gives several values; `r1pipe run --multirun` runs each; write "
                "a list as [a,b], a string as 'a,b'"
            )
    choices = choose(parsed)
    values = layered(parsed, choices)
    below = [f"{group}={option}" for group, option in choices.items()]
    below += [f"++{key}={json.dumps(value, ensure_ascii=False)}" for key, (value, _) in values.items()]
    own = [override for override in parsed if override.key_or_group not in GROUPS]
    mapping = resolve(below, own)
    for key in RECIPE_ONLY:
        mapping["recipe"].pop(key, None)
    given = [key for key, _ in flat(mapping)]
    if choices["model"] == HF:
        mapping["model"] = filled(mapping["model"])
    files = {key: file for key, (_, file) in values.items()}
    files |= {override.key_or_group: COMMAND_LINE for override in own}
    if set(KEYS) <= mapping["stage"].keys():
        more, file = settled(mapping["stage"], mapping["engine"])
        mapping["stage"] |= more
        files |= {f"stage.{key}": file for key in more}
    config = load({**mapping, **FILLED_AT_LAUNCH})
    check(config)
    refuse_unused_row_keys({override.key_or_group for override in own}, config.data)
    return Composed(config, given, choices, files)


def parse(overrides: list[str]) -> list[Override]:
    """Hydra's reading of the overrides, sweeps included; `precision=` and `kernels=` are the engine's.

    Raises ConfigError.
    """
    for line in overrides:
        if "=" not in line and not line.startswith("~"):
            raise ConfigError(f"'{line}' is no override; write key=value, +key=value or ~key")
    parsed = [parse_one(re.sub("^(?=(precision|kernels)=)", "engine.", line)) for line in overrides]
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
            return OverridesParser.create().parse_overrides([reading])[0]
        except HydraException as error:
            problem = first_line(error)
    raise ConfigError(f"cannot read {line}: {problem}; write a string as key=\"'...'\"")


def choose(parsed: list[Override]) -> dict[str, str]:
    """Each group's option: the user's, else the recipe's, else conf/config.yaml's. Raises ConfigError."""
    own: dict[str, str] = {}
    for override in parsed:
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


def layered(parsed: list[Override], choices: dict[str, str]) -> dict[str, tuple[Any, str]]:
    """What is placed between the chosen groups and the command line: dotted key -> (value, its source)."""
    own = {str(override.key_or_group): str(override.value()) for override in parsed}
    content = read(f"recipe/{choices['recipe']}")
    recipe: dict[str, Any] = dict(flat(content.get("values") or {}))
    for part in (content["every_stage"], content["stage_values"].get(choices["stage"])):
        recipe |= flat(part or {}, "stage")
    layers = [(recipe, f"conf/recipe/{choices['recipe']}.yaml")]
    if issubclass(STAGE_TYPES[choices["stage"]], RLConfig):
        below, above = [], []
        for kind in NAMED:
            key = f"stage.{kind}"
            if own.get(key, NULL) != NULL:
                above.append(named_values(kind, own[key]))
            elif recipe.get(key) is not None:
                below.append(named_values(kind, recipe[key]))
        layers = [*below, *layers, *above]
    has_no_masters = read(f"engine/{choices['engine']}")["zero_level"] == 0
    if own.get("engine.precision") in WITH_MASTERS and has_no_masters:
        layers.append(({"engine.zero_level": 1}, COMMAND_LINE))
    if own.get("teacher", NULL) != NULL:  # no samples of a run are needed
        layers.append(({"stage.reads": []}, COMMAND_LINE))
    if own.get("judge", NULL) != NULL:
        layers = [*judge_values(choices["stage"]), *layers]
    return {key: (value, source) for values, source in layers for key, value in values.items()}


def judge_values(stage: str) -> list[tuple[dict[str, Any], str]]:
    """The values of stage.judge in this stage, and their files. Raises ConfigError where it asks no judge."""
    parts = JUDGE_PARTS.get(STAGE_TYPES[stage])
    if parts is None:
        stages = sorted(name for name, kind in STAGE_TYPES.items() if kind in JUDGE_PARTS)
        raise ConfigError(f"judge=MODEL: stage={stage} asks no judge; {', '.join(stages)} do")
    files = ["stage/part/answerer", "stage/part/judge/asked", *(f"stage/part/judge/{part}" for part in parts)]
    return [(dict(flat(read(file), JUDGE)), f"conf/{file}.yaml") for file in files]


def named_values(kind: str, name: str) -> tuple[dict[str, Any], str]:
    """The values that go by the name of a loss or an algorithm, and their file. Raises ConfigError."""
    folder = f"stage/part/{kind}"
    if name not in options(folder):
        raise ConfigError(f"stage.{kind}={name}: no such {kind}; {nearest(name, options(folder))}")
    return dict(flat(read(f"{folder}/{name}"), "stage")), f"conf/{folder}/{name}.yaml"


def resolve(below: list[str], own: list[Override]) -> dict[str, Any]:
    """conf/ with the overrides applied in order, interpolations filled in. Raises ConfigError."""
    lines = [addable(override) for override in own]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        try:
            cfg = hydra_compose("config", below + lines)
            return cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
        except (HydraException, OmegaConfBaseException) as error:
            known = OmegaConf.to_container(hydra_compose("config", below), resolve=False)
            keys = {part for key, _ in flat(cast(dict[str, Any], known)) for part in upwards(key)}
            raise ConfigError(explained(error, own, keys)) from None


def addable(override: Override) -> str:
    """The override as Hydra reads it, with `++` where it may add keys: +key=value sets a key that exists,
    too, and a mapping may bring new names, as in stage.rewards.weights={my_reward: 1}, and have them."""
    is_open = override.key_or_group.rpartition(".")[0] in open_mappings()
    adds = override.is_add() or (not override.is_delete() and (is_open or isinstance(override.value(), dict)))
    line = str(override.input_line)
    return f"++{line.lstrip('+')}" if adds else line


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
        if above == PPO and not beside:
            return f"{key} needs stage.algorithm=ppo"
        if JUDGE in upwards(key) and JUDGE in known:
            return f"{key} needs judge=MODEL; or it is no key of stage.judge in this stage"
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
