"""The limits of generated programs: `stage.code` of the run, for rewards, filters and evaluations alike.

They are one setting of the process, as its threads and caches are: what checks a program (a reward, a filter,
a vote, `r1pipe score`) does not ask for it, and so cannot differ.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from r1pipe.config import CodeConfig
from r1pipe.config.fields import build
from r1pipe.core.paths import conf_dir

_chosen: list[CodeConfig] = []


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    cpu_s: float  # processor time of each test, and of the program's definition
    memory: int  # bytes
    partial_credit: bool = False


def use(config: CodeConfig) -> None:
    """Set the limits of this process."""
    _chosen[:] = [config]


def limits_of(task: Mapping[str, Any]) -> Limits:
    """The limits for a task: its own time limit, scaled, where that is the shorter one."""
    config = _chosen[0] if _chosen else published()
    own = task.get("time_limit_s", 0) * config.time_limit_factor
    cpu_s = min(own, config.cpu_seconds) if own else config.cpu_seconds
    return Limits(cpu_s, config.memory_mb << 20, config.partial_credit)


@cache
def published() -> CodeConfig:
    """The values in conf/, which hold where `use` has set no others."""
    values: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "stage" / "part" / "common.yaml"))
    return build(CodeConfig, values["code"], "stage.code")
