"""The verbs that run a script of stages/ without DeepSpeed: answers, verdicts, weights out, weights in."""

import shlex
from collections.abc import Mapping
from pathlib import Path

from r1pipe.config.compose import compose
from r1pipe.core.errors import ConfigError
from r1pipe.core.paths import IMPORTED
from r1pipe.launch import job as launch
from r1pipe.runs import lineage

Settings = Mapping[str, str | float | None]  # options of a script; those that are None are not given


def _place(overrides: list[str]) -> lineage.Place:
    return lineage.Place.of(compose(overrides).config)


def _options(settings: Settings) -> list[str]:
    return [f"{name}={value}" for name, value in settings.items() if value is not None]


def answer(
    checkpoint: str,
    overrides: list[str],
    settings: Settings,
    flags: list[str],
    questions: list[str],
) -> int:
    """Run stages/generate.py, which loads the model; its exit code."""
    parent = lineage.resolve(checkpoint, _place(overrides))
    return launch.script("generate.py", [*_options(settings), *flags, "--", parent.checkpoint, *questions])


def export(checkpoint: str, folder: Path, overrides: list[str], settings: Settings) -> int:
    """Run stages/export.py; its exit code."""
    parent = lineage.resolve(checkpoint, _place(overrides))
    return launch.script("export.py", [*_options(settings), "--", parent.checkpoint, str(folder)])


def score(file: Path, reward: str, language: str) -> int:
    """Run stages/score.py, which judges the completions of a file; its exit code."""
    settings: Settings = {"--reward": reward, "--language": language}
    return launch.script("score.py", [*_options(settings), "--", str(file)])


def take_in(folder: Path, name: str | None, overrides: list[str], settings: Settings) -> int:
    """Run stages/import_weights.py, and say how to go on; its exit code.

    The checkpoint goes to ROOT/imported/NAME, which `parent=imported/NAME` finds. Raises ConfigError.
    """
    called = name or folder.resolve().name
    if Path(called).name != called or called == "..":
        raise ConfigError(f"--name {called} must be a name, not a path")
    target = _place(overrides).root / IMPORTED / called
    code = launch.script("import_weights.py", [*_options(settings), "--", str(folder), str(target)])
    if code == 0:
        shape = lineage.settings_of(lineage.of_folder(target), set())
        line = ["r1pipe", "run", "stage=cold_start", f"parent={IMPORTED}/{called}", *shape, *overrides]
        print(f"go on with: {shlex.join(line)}")
    return code
