"""What a data set can give a stage, and `open_data`, which opens the one that the config names."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from r1pipe.config import DataConfig
from r1pipe.config.changes import ABSENT, HASH_SHOWN
from r1pipe.core.errors import ConfigError, DataError, nearest
from r1pipe.core.types import Demonstration, PreferencePair, Prompt, SafetyLabel
from r1pipe.data.rejected_rows import RejectedRows

SPLITS = ("train", "dev", "test")


class Documents(Protocol):
    """Endless pre-training text that can be sought in."""

    state: Any  # where the next document begins, in plain values; set it to seek

    def __iter__(self) -> Iterator[str]: ...

    def __next__(self) -> str: ...


class Source(Protocol):
    """Every method is a pure function of its arguments: the same call gives the same list, in every process.

    A list may be shorter than the `n` asked for, or empty, where the data has no more; `n` is never padded
    with repeats. Splits never overlap. What is malformed raises DataError, naming file, line and remedy.
    """

    hash: str  # of all that the source can give: changes when a file, a task or a generator does

    files: dict[str, str]  # path -> SHA-256 of each file that it is read from; none where it is made

    @property
    def judge(self) -> Callable[[Prompt, str], Any] | None:
        """The hidden truth about a general response; None where nobody knows it."""

    @property
    def strategy_of(self) -> Callable[[Prompt, str], str] | None:
        """The name of how a response goes about a problem; None where strategies are not known."""

    def prompts(self, split: str, n: int, seed: int) -> list[Prompt]:
        """Reasoning problems with what judges them."""

    def rows(self, split: str) -> list[Demonstration] | None:
        """Every problem as the data has it, repeated ones too, with its solution as it stands there, or "";
        None where problems are made, not read."""

    def demonstrations(
        self, n: int, seed: int, styles: dict[str, float], correct_only: bool
    ) -> list[Demonstration]:
        """Worked solutions of training problems: `<think>` reasoning `</think>` and a summary."""

    def general_prompts(self, split: str, n: int, seed: int, kinds: Mapping[str, float]) -> list[Prompt]:
        """Writing, facts, identity, translation and safety: what no rule judges; `kinds`: their shares."""

    def general_demonstrations(self, n: int, seed: int, kinds: Mapping[str, float]) -> list[Demonstration]:
        """Training prompts of the general kinds with a written response; `kinds`: the share of each."""

    def preference_pairs(self, split: str, n: int, seed: int) -> list[PreferencePair]:
        """Two answers to a general prompt, the better one first."""

    def safety_labels(self, split: str, n: int, seed: int) -> list[SafetyLabel]:
        """Responses labelled safe or unsafe."""

    def documents(self, seed: int) -> Documents:
        """Pre-training text without end. Raises ConfigError where the source has none."""


def _world(config: DataConfig, seed: int, aside: RejectedRows) -> Source:
    from r1pipe.data.world import World

    return World(config, seed, aside.say)


def _files(config: DataConfig, seed: int, aside: RejectedRows) -> Source:
    from r1pipe.data.files import Files

    return Files(config, aside)


def _reasoning_gym(config: DataConfig, seed: int, aside: RejectedRows) -> Source:
    from r1pipe.data.reasoning_gym import ReasoningGym

    return ReasoningGym(config)


# Imported when opened: `datasets` and reasoning-gym take seconds, and only some runs need them.
KINDS: dict[str, Callable[[DataConfig, int, RejectedRows], Source]] = {
    "world": _world,
    "files": _files,
    "reasoning_gym": _reasoning_gym,
}


def open_data(
    config: DataConfig, seed: int, folder: Path | None = None, say: Callable[[str], None] | None = None
) -> Source:
    """The source of `data.kind`. Raises ConfigError on an unknown kind, DataError on unusable data.

    With data.bad_rows=set_aside, rows that cannot be used are written to `folder`. `say` takes one line about
    such rows, or about a split that has fewer problems than were asked for.
    """
    if config.kind not in KINDS:
        raise ConfigError(f"data.kind={config.kind} is unknown; {nearest(config.kind, list(KINDS))}")
    return KINDS[config.kind](config, seed, RejectedRows(folder, say))


def check_data_unchanged(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises DataError where a source ({"hash", "files"}) is not what a run began with, in one line with the
    files that differ."""
    if before["hash"] == now["hash"]:
        return
    old, new = before["files"], now["files"]
    files = {path: (old.get(path, ABSENT), new.get(path, ABSENT)) for path in sorted({**old, **new})}
    differing = {path: pair for path, pair in files.items() if pair[0] != pair[1]}
    told = differing or {f"data={name}": (before["hash"], now["hash"])}
    listed = ", ".join(f"{what}: {a[:HASH_SHOWN]} -> {b[:HASH_SHOWN]}" for what, (a, b) in told.items())
    raise DataError(
        f"the data is not what this run began with ({listed}); put it back and the same command goes on, or "
        "--fresh starts a new run"
    )
