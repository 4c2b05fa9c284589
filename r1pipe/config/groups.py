"""The files of conf/: the groups, their options, and which file gives which key."""

from collections.abc import Iterator
from functools import cache
from typing import Any, cast

from r1pipe.core.errors import ConfigError
from r1pipe.core.paths import conf_dir

GROUPS = ("stage", "recipe", "model", "data", "engine", "tracking", "tripwires", "screening", "benchmark")


def options(group: str) -> list[str]:
    """The names that `group=NAME` takes; folders below a group hold shared parts, not options."""
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def with_stage(overrides: list[str]) -> list[str]:
    """The overrides as they are. Raises ConfigError where they choose no stage."""
    if not any(line.startswith("stage=") for line in overrides):
        raise ConfigError(f"which stage? give stage=NAME; known: {', '.join(options('stage'))}")
    return overrides


@cache
def read(name: str) -> dict[str, Any]:
    """conf/<name>.yaml as it is written, without what its defaults list brings in."""
    from omegaconf import OmegaConf  # its YAML reads 1e-5 as a number, PyYAML's does not

    content = OmegaConf.load(conf_dir() / f"{name}.yaml")
    return cast(dict[str, Any], OmegaConf.to_container(content, resolve=False))


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every leaf; lists and empty mappings are leaves."""
    for key, value in tree.items():
        name = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, dict) and value:
            yield from flat(value, name)
        else:
            yield name, value


def upwards(key: str) -> Iterator[str]:
    """a.b.c, a.b, a"""
    while key:
        yield key
        key = key.rpartition(".")[0]
