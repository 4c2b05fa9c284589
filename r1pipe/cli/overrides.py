"""The words of the command line that are overrides of the config; Hydra is imported when they are read."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from r1pipe.config import RunConfig


def composed(overrides: list[str]) -> "RunConfig":
    from r1pipe.config.compose import compose

    return compose(overrides).config


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """Other words, and overrides: those that begin with a key of the config and `=`."""
    from r1pipe.config.compose import TOP_KEYS

    overrides = [word for word in words if "=" in word and re.split(r"[.=]", word)[0] in TOP_KEYS]
    return [word for word in words if word not in overrides], overrides


def pipeline_in(overrides: list[str]) -> str | None:
    """The pipeline that the overrides name; None for all."""
    is_named = any(line.partition("=")[0] in ("pipeline", "recipe", "seed") for line in overrides)
    return composed(overrides).pipeline if is_named else None
