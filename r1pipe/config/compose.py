"""Overrides -> one checked RunConfig: Hydra resolves conf/, a recipe's values go under the user's own.

The recipe chooses groups (`choose`), values (`values`) and those of stages (`every_stage`, `stage_values`).
They come before the command line's overrides, so the command line always wins. Where the recipe or the
command line names a loss (`stage.loss`), an algorithm (`stage.algorithm`) or a correction
(`stage.importance`), the values of its file come just before those of whoever named it, the algorithm's after
the loss's. Those of a `stage.transfer`, and of it with a `stage.extract`, come before the recipe's, which has
values for `distill/TRANSFER` and `distill/TRANSFER/EXTRACT`.
"""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from r1pipe.config import benchmark
from r1pipe.config.data import refuse_unused_row_keys
from r1pipe.config.distill import DistillConfig
from r1pipe.config.distill_unused import refuse_unused_teaching_keys
from r1pipe.config.groups import GROUPS, flat, options, read, upwards
from r1pipe.config.hf import NAME as HF
from r1pipe.config.hf import filled
from r1pipe.config.importance import KEYS, settled
from r1pipe.config.overrides import FILLED_AT_LAUNCH, JUDGE, addable, explained, parse
from r1pipe.config.rl import RLConfig
from r1pipe.config.rules import check
from r1pipe.config.run import STAGE_TYPES, RunConfig, load
from r1pipe.config.stages import EvaluateConfig, RejectionConfig, RewardModelConfig
from r1pipe.core.errors import ConfigError, nearest
from r1pipe.core.paths import conf_dir

COMMAND_LINE = "command line"
RECIPE_ONLY = ("choose", "values", "every_stage", "stage_values")  # a job's config holds what comes of them
NAMED = ("loss", "algorithm", "importance")  # `stage.loss=NAME`: a file in conf/stage/part/loss, and so on
NULL = "None"  # how Hydra reads the value null
TRANSFER = "stage/part/transfer"
JUDGE_PARTS: dict[type, tuple[str, ...]] = {  # what a stage adds to it: files of conf/stage/part/judge/
    EvaluateConfig: ("evaluator",),
    RejectionConfig: ("filter",),
    RewardModelConfig: ("labels",),
    RLConfig: (),
}
STYLES = "stage.styles"  # a recipe's are for its own data, and the command line's replace them
WITH_MASTERS = ("bf16", "fp8")  # precisions that need a ZeRO level which keeps float32 masters


@dataclass(frozen=True)
class Composed:
    """A config, and what tells where its values come from."""

    config: RunConfig
    keys: list[str]
    choices: dict[str, str | None]  # group -> option; null: none
    files: dict[str, str]  # dotted key -> source, for all that is placed above the groups

    @cached_property
    def sources(self) -> dict[str, str]:
        """For every dotted key the file that gave its value, or COMMAND_LINE."""
        files: dict[str, str] = {}
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            loader = GlobalHydra.instance().config_loader()
            defaults = loader.compute_defaults_list(
                "config", as_overrides(self.choices), RunMode.RUN
            ).defaults
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
    own = [override for override in parsed if override.key_or_group not in GROUPS]
    mapping = {"benchmark": None, **resolve(choices, {key: value for key, (value, _) in values.items()}, own)}
    for key in RECIPE_ONLY:
        mapping["recipe"].pop(key, None)
    given = [key for key, _ in flat(mapping)]
    if choices["model"] == HF:
        mapping["model"] = filled(mapping["model"])
    files = {key: file for key, (_, file) in values.items()}
    files |= {override.key_or_group: COMMAND_LINE for override in own}
    for place, values in (("stage", mapping["stage"]), ("stage.rl", mapping["stage"].get("rl") or {})):
        if set(KEYS) <= values.keys():
            more, file = settled(values, mapping["engine"])
            values |= more
            files |= {f"{place}.{key}": file for key in more}
    if name := choices["benchmark"]:
        measured = benchmark.apply(mapping, {str(override.key_or_group) for override in own})
        files |= dict.fromkeys(measured, f"conf/benchmark/{name}.yaml")
    config = load({**mapping, **FILLED_AT_LAUNCH})
    check(config)
    refuse_unused_teaching_keys({override.key_or_group for override in own}, config.stage, config.teacher)
    refuse_unused_row_keys({override.key_or_group for override in own}, config.data)
    return Composed(config, given, choices, files)


def choose(parsed: list[Override]) -> dict[str, str | None]:
    """Each group's option: the user's, else the benchmark's, the recipe's, conf/config.yaml's; a benchmark
    chooses its data. Raises ConfigError."""
    own: dict[str, str | None] = {}
    for override in parsed:
        group = override.key_or_group
        if group == "benchmark" and override.value() is None:
            own[group] = None
        elif group in GROUPS:
            option = str(override.value())
            if override.is_delete() or option not in options(group):
                raise ConfigError(
                    f"{override.input_line}: no such {group}; {nearest(option, options(group))}"
                )
            own[group] = option
    defaults: dict[str, str | None] = {}
    for item in read("config")["defaults"]:
        defaults |= {} if item == "_self_" else item
    recipe = own.get("recipe", defaults["recipe"])
    defaults |= read(f"recipe/{recipe}")["choose"]
    if own.get("benchmark") and (data := read(f"benchmark/{own['benchmark']}").get("data")):
        defaults["data"] = data
    return defaults | own


def as_overrides(choices: Mapping[str, str | None]) -> list[str]:
    """The choices as Hydra reads them."""
    return [f"{group}={option}" for group, option in choices.items() if option]


def layered(parsed: list[Override], choices: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    """What is placed between the chosen groups and the command line: dotted key -> (value, its source)."""
    own = {str(override.key_or_group): str(override.value()) for override in parsed}
    stage, content = choices["stage"], read(f"recipe/{choices['recipe']}")
    transfer = chosen_transfer(stage, own)
    recipe = recipe_values(content, stage, transfer, own)
    if STYLES in own or choices["data"] != content["choose"].get("data"):
        recipe = {key: value for key, value in recipe.items() if not key.startswith(f"{STYLES}.")}
    layers = [(recipe, f"conf/recipe/{choices['recipe']}.yaml")]
    if issubclass(STAGE_TYPES[stage], RLConfig) or transfer == "rl":
        place, below, above = "stage.rl" if transfer else "stage", [], []
        for kind in NAMED:
            key = f"{place}.{kind}"
            if own.get(key, NULL) != NULL:
                above.append(named_values(kind, own[key], place))
            elif recipe.get(key) is not None:
                below.append(named_values(kind, recipe[key], place))
        layers = [*below, *layers, *above]
    if transfer:
        layers = [*transfer_values(transfer, chosen(stage, "extract", own)), *layers]
    has_no_masters = read(f"engine/{choices['engine']}")["zero_level"] == 0
    if own.get("engine.precision") in WITH_MASTERS and has_no_masters:
        layers.append(({"engine.zero_level": 1}, COMMAND_LINE))
    if own.get("teacher", NULL) != NULL:  # no samples of a run are needed
        layers.append(({"stage.reads": []}, COMMAND_LINE))
    if own.get("judge", NULL) != NULL:
        layers = [*judge_values(choices["stage"]), *layers]
    return {key: (value, source) for values, source in layers for key, value in values.items()}


def recipe_values(
    content: Mapping[str, Any], stage: str, transfer: str | None, own: dict[str, str]
) -> dict[str, Any]:
    """A recipe's values for all, for every stage, for this one, and for its transfer with its extract."""
    names = [stage]
    if transfer:
        names += [f"{stage}/{transfer}", f"{stage}/{transfer}/{chosen(stage, 'extract', own)}"]
    values = dict(flat(content.get("values") or {}))
    for part in (content["every_stage"], *map(content["stage_values"].get, names)):
        values |= flat(part or {}, "stage")
    return values


def judge_values(stage: str) -> list[tuple[dict[str, Any], str]]:
    """The values of stage.judge in this stage, and their files. Raises ConfigError where it asks no judge."""
    parts = JUDGE_PARTS.get(STAGE_TYPES[stage])
    if parts is None:
        stages = sorted(name for name, kind in STAGE_TYPES.items() if kind in JUDGE_PARTS)
        raise ConfigError(f"judge=MODEL: stage={stage} asks no judge; {', '.join(stages)} do")
    files = ["stage/part/answerer", "stage/part/judge/asked", *(f"stage/part/judge/{part}" for part in parts)]
    return [(dict(flat(read(file), JUDGE)), f"conf/{file}.yaml") for file in files]


def named_values(kind: str, name: str, place: str) -> tuple[dict[str, Any], str]:
    """The values that go by the name of a loss or an algorithm, below `place`, and their file. Raises
    ConfigError."""
    folder = f"stage/part/{kind}"
    if name not in options(folder):
        raise ConfigError(f"{place}.{kind}={name}: no such {kind}; {nearest(name, options(folder))}")
    return dict(flat(read(f"{folder}/{name}"), place)), f"conf/{folder}/{name}.yaml"


def chosen_transfer(stage: str, own: dict[str, str]) -> str | None:
    """What puts a teacher into a student, in a stage that has one. Raises ConfigError."""
    if not issubclass(STAGE_TYPES[stage], DistillConfig):
        return None
    name = chosen(stage, "transfer", own)
    if name not in options(TRANSFER):
        raise ConfigError(f"stage.transfer={name}: no such transfer; {nearest(name, options(TRANSFER))}")
    return name


def chosen(stage: str, key: str, own: dict[str, str]) -> str:
    """The command line's value of a stage's key, else that of the stage's file."""
    return own.get(f"stage.{key}", read(f"stage/{stage}")[key])


def transfer_values(transfer: str, extract: str) -> list[tuple[dict[str, Any], str]]:
    """The values of a transfer's file, and of that for it with what the teacher gives, if there is one."""
    files = [f"{TRANSFER}/{transfer}"]
    if extract in options(files[0]):
        files.append(f"{files[0]}/{extract}")
    return [(dict(flat(read(file), "stage")), f"conf/{file}.yaml") for file in files]


def resolve(
    choices: Mapping[str, str | None], values: Mapping[str, Any], own: list[Override]
) -> dict[str, Any]:
    """conf/ with the values and then the command line's overrides, interpolations filled in. Raises
    ConfigError."""
    config = placed(choices, values)
    try:
        ConfigLoaderImpl._apply_overrides_to_config([*map(addable, own)], config)
        return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True))
    except (HydraException, OmegaConfBaseException) as error:
        known = cast(dict[str, Any], OmegaConf.to_container(placed(choices, values), resolve=False))
        keys = {part for key, _ in flat(known) for part in upwards(key)}
        raise ConfigError(explained(error, own, keys)) from None


def placed(choices: Mapping[str, str | None], values: Mapping[str, Any]) -> DictConfig:
    """The chosen groups with the values above them."""
    config = deepcopy(grouped(*as_overrides(choices)))
    for key, value in values.items():
        OmegaConf.update(config, key, value, force_add=True)
    return config


@cache
def grouped(*choices: str) -> DictConfig:
    """conf/ with these options of its groups: most of a composition's time, and the same for many."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return hydra_compose("config", [*choices])
