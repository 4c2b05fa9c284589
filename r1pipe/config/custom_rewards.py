"""Custom rewards: which of them a config names, and where each comes from. None of their code runs here.

A reward is a function in a file of `stage.rewards.plugins`, an installed entry point of the group
`r1pipe.rewards`, or a server of `stage.rewards.remote`. r1pipe/rewards/custom.py runs them.
"""

import ast
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from r1pipe.core import python_source
from r1pipe.core.errors import ConfigError, nearest
from r1pipe.core.redaction import without_login

ENTRY_POINTS = "r1pipe.rewards"  # the group of installed rewards
TOKEN = "R1PIPE_REWARD_TOKEN"  # the variable whose value a server gets as a bearer token


@dataclass(frozen=True)
class CustomReward:
    """A reward that is no rule of r1pipe's."""

    name: str
    kind: Literal["file", "entry_point", "remote"]
    location: str  # the file's path; module:function; URL
    hash: str = ""  # SHA-256 of the file
    version: str = ""  # distribution and version of an entry point
    source: bytes = b""  # the file's content

    @property
    def place(self) -> str:
        """The location as it is recorded: a file by its whole path."""
        return str(Path(self.location).resolve()) if self.kind == "file" else self.location


def find(
    names: Iterable[str], rules: Iterable[str], plugins: Iterable[str], remote: Mapping[str, str]
) -> list[CustomReward]:
    """Where the rewards `names` come from, without those that are rules.

    Raises ConfigError, one line: on a name that is nowhere or in two places, on a file or server none of
    whose rewards is named, and on a file that cannot be read as Python.
    """
    names, rules = list(names), list(rules)
    offered: dict[str, list[CustomReward]] = {}
    for reward in (*in_files(plugins, names), *on_servers(remote, names)):
        offered.setdefault(reward.name, []).append(reward)
    if taken := sorted({*offered} & {*rules} & {*names}):
        place = offered[taken[0]][0].location
        raise ConfigError(
            f"stage.rewards.weights.{taken[0]} is a rule of r1pipe and in {place}; rename that one"
        )
    custom = [name for name in names if name not in rules]
    for reward in installed() if custom else ():
        offered.setdefault(reward.name, []).append(reward)
    for name in custom:
        key, places = f"stage.rewards.weights.{name}", offered.get(name, [])
        if not places:
            raise ConfigError(
                f"{key} is no rule reward, nor one of stage.rewards.plugins or stage.rewards.remote, nor "
                f"installed; {nearest(name, [*rules, *offered])}"
            )
        if len(places) > 1:
            raise ConfigError(f"{key} is in {places[0].location} and in {places[1].location}; rename one")
        if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
            raise ConfigError(f"{key}: the name of a reward has letters, digits and _ only; rename it")
    return [offered[name][0] for name in custom]


def in_files(plugins: Iterable[str], names: Iterable[str]) -> Iterator[CustomReward]:
    """Raises ConfigError."""
    for path in plugins:
        try:
            source = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(
                f"stage.rewards.plugins: {path} cannot be read ({error.strerror}); give a Python file's path"
            ) from None
        functions = names_in(path, source)
        if not functions & {*names}:
            has = ", ".join(sorted(functions)) or "no function"
            raise ConfigError(
                f"stage.rewards.plugins: {path} has no reward that stage.rewards.weights names; it has {has}"
            )
        sha = hashlib.sha256(source).hexdigest()
        for name in functions:
            yield CustomReward(name, "file", path, hash=sha, source=source)


def on_servers(remote: Mapping[str, str], names: Iterable[str]) -> Iterator[CustomReward]:
    """Raises ConfigError."""
    for name, url in remote.items():
        check_url(name, url)
        if name not in names:
            raise ConfigError(f"stage.rewards.remote.{name} has no weight; give stage.rewards.weights.{name}")
        yield CustomReward(name, "remote", url)


def names_in(path: str, source: bytes) -> set[str]:
    """The public names that a Python file defines or imports at its top level, without what it imports of
    r1pipe, such as the reward `accuracy` to build on. Raises ConfigError."""
    try:
        body = python_source.parse(source).body
    except (SyntaxError, ValueError) as error:  # ValueError: a NUL
        line = getattr(error, "lineno", None) or 1
        raise ConfigError(f"stage.rewards.plugins: {path}:{line}: {error.args[0]}; correct it") from None
    names: list[str] = []
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if node.name in names:
                raise ConfigError(
                    f"stage.rewards.plugins: {path}:{node.lineno}: {node.name} is defined twice"
                )
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.ImportFrom) and not f"{node.module}.".startswith("r1pipe."):
            names += [alias.asname or alias.name for alias in node.names]
    return {name for name in names if not name.startswith("_")}


def check_url(name: str, url: str) -> None:
    """Raises ConfigError."""
    key = f"stage.rewards.remote.{name}"
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, a bracket that is not closed
        usable = False
    if not usable or re.search(r"\s", url):
        raise ConfigError(f"{key}={without_login(url)} is no address; give http://HOST:PORT/PATH")
    if without_login(url) != url:
        raise ConfigError(
            f"{key}={without_login(url)} has a secret in it; give that as {TOKEN}, not in the URL"
        )


def installed() -> Iterator[CustomReward]:
    """The entry points of installed packages."""
    for point in entry_points(group=ENTRY_POINTS):
        version = f"{point.dist.name} {point.dist.version}" if point.dist else ""
        yield CustomReward(point.name, "entry_point", point.value, version=version)
