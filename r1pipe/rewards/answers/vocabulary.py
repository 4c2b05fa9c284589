"""The words that answers are read by: `vocabulary.yaml`."""

from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf


@cache
def _content() -> dict[str, Any]:
    return dict(OmegaConf.load(Path(__file__).with_suffix(".yaml")))


def words(name: str) -> frozenset[str]:
    """The words of a list."""
    return frozenset(_content()[name].split())


def any_of(name: str) -> str:
    """A regular expression for any word of a list."""
    return f"(?:{'|'.join(_content()[name].split())})"


def synonyms() -> dict[str, str]:
    """The first of several texts that mean the same, by each of them."""
    groups = [group.split() for group in _content()["synonyms"]]
    return {text: group[0] for group in groups for text in group}


def names_of_units() -> dict[str, str]:
    """pint's name of each spelling of a unit."""
    return {str(spelling): name for name, several in _content()["units"].items() for spelling in several}
