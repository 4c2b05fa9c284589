"""What a data set can give a stage, and drawing enough of it that fits a model's context."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from r1pipe.chat.template import Chat
from r1pipe.config import DataConfig
from r1pipe.config.changes import ABSENT, HASH_SHOWN
from r1pipe.core.errors import ConfigError, DataError
from r1pipe.core.types import Demonstration, PreferencePair, Prompt, SafetyLabel
from r1pipe.runs import heartbeat

T = TypeVar("T")

SPLITS = ("train", "dev", "test")
GROWTH = 4  # how many times as much is drawn when too few fit
MOST = 64  # items drawn per item wanted, after which an endless source is given up


class Documents(Protocol):
    """Endless pre-training text with a position that can be saved and restored."""

    state: Any  # where the next document begins, in plain values; set it to seek

    def __iter__(self) -> Iterator[str]: ...

    def __next__(self) -> str: ...


class Source:
    """Every method is a pure function of its arguments: the same call gives the same list, in every process.

    A list may be shorter than the `n` requested, or empty, where the data has no more; it is never padded
    with repeats. Splits never overlap. Malformed data raises DataError, naming file, line and remedy.
    A source overrides what its data has.
    """

    config: DataConfig
    hash: str  # of everything the source can give: changes when a file, a task or a generator does
    files: dict[str, str]  # path -> SHA-256 of each file read; empty where the data is generated
    layouts: Sequence[str] = ()  # a line on each file whose columns are not named: what is read as what
    truth: Callable[[Prompt, str], Any] | None = None  # the hidden truth about a general response
    strategy_of: Callable[[Prompt, str], str] | None = None  # the name of a response's strategy

    def prompts(self, split: str, n: int, seed: int) -> list[Prompt]:
        """Reasoning problems with gold answers or checkers."""
        raise NotImplementedError

    def harder_prompts(self, split: str, n: int, seed: int) -> list[Prompt]:
        """n problems of each level above those of `data.levels`."""
        return []

    def rows(self, split: str) -> list[Demonstration] | None:
        """Every problem in the data, repeats included, with its solution as written there, or "";
        None where problems are generated."""
        return None

    def demonstrations(
        self, n: int, seed: int, styles: dict[str, float], correct_only: bool
    ) -> list[Demonstration]:
        """Worked solutions of training problems: `<think>` reasoning `</think>` and a summary."""
        raise DataError(f"data={self.config.name} has no worked solutions; try data=world or data=gsm8k")

    def general_prompts(self, split: str, n: int, seed: int, kinds: Mapping[str, float]) -> list[Prompt]:
        """Writing, facts, identity, translation and safety, which no rule scores; `kinds`: their shares."""
        return []

    def general_demonstrations(self, n: int, seed: int, kinds: Mapping[str, float]) -> list[Demonstration]:
        """Training prompts of the general kinds with a written response; `kinds`: the share of each."""
        return []

    def preference_pairs(self, split: str, n: int, seed: int) -> list[PreferencePair]:
        """Two answers to a general prompt, the better one first."""
        return []

    def safety_labels(self, split: str, n: int, seed: int) -> list[SafetyLabel]:
        """Responses labelled safe or unsafe."""
        return []

    def documents(self, seed: int) -> Documents:
        """Endless pre-training text. Raises ConfigError where the source has none."""
        raise ConfigError(f"data={self.config.name} has no documents to pre-train on; use data=world")


def check_data_unchanged(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises DataError where a source ({"hash", "files"}) differs from the one a run began with, in one line
    with the files that differ."""
    if before["hash"] == now["hash"]:
        return
    old, new = before["files"], now["files"]
    files = {path: (old.get(path, ABSENT), new.get(path, ABSENT)) for path in sorted({**old, **new})}
    changed = {path: pair for path, pair in files.items() if pair[0] != pair[1]}
    changed = changed or {f"data={name}": (before["hash"], now["hash"])}
    listed = ", ".join(f"{what}: {a[:HASH_SHOWN]} -> {b[:HASH_SHOWN]}" for what, (a, b) in changed.items())
    raise DataError(
        f"the data has changed since this run began ({listed}); restore it and repeat the command to resume, "
        "or add --fresh to start a new run"
    )


def prompt_fits(chat: Chat, context: int, max_tokens: int) -> Callable[[Prompt], bool]:
    """Whether a prompt with a response of `max_tokens` fits a context of `context` tokens."""
    return lambda prompt: len(chat.prompt_tokens(prompt)) <= context - max_tokens


def draw_prompts_that_fit(
    draw: Callable[[int], Sequence[T]], n: int, fits: Callable[[T], bool]
) -> tuple[list[T], int]:
    """Up to n items of `draw(m)` that fit, and how many too long ones were skipped on the way.

    Draws more while too few fit: where fewer than n come back, the source has no more.
    """
    size = n
    while True:
        items = draw(size)
        fitting: list[T] = []
        too_long = 0
        for item in items:
            if len(fitting) == n:
                break
            heartbeat.tick()
            if fits(item):
                fitting.append(item)
            else:
                too_long += 1
        if len(fitting) == n or len(items) < size or size >= MOST * n:
            return fitting, too_long
        size *= GROWTH
