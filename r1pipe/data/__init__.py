"""Where prompts and demonstrations come from: files, reasoning-gym, and the bundled world."""

from collections.abc import Callable
from pathlib import Path

from r1pipe.config import DataConfig, ScreeningConfig
from r1pipe.data.source import Source


def open_data(
    config: DataConfig,
    seed: int,
    folder: Path | None = None,
    report: Callable[[str], None] | None = None,
    screening: ScreeningConfig | None = None,
) -> Source:
    """The source of `data.kind`. Raises ConfigError or DataError on unusable data.

    With data.bad_rows=set_aside, bad rows are written to `folder`. `report` takes one line about such rows,
    or about a split that has fewer problems than requested. Rows of files are dropped and rewritten as
    `screening` says; what is trained on is counted later.
    """
    # imported here: reasoning-gym takes seconds to load
    if config.kind == "world":
        from r1pipe.data.world import World

        return World(config, seed, report)
    if config.kind == "files":
        from r1pipe.data.files import Files
        from r1pipe.data.screening import Screening

        screens = Screening(screening) if screening else None
        return Files(config, folder, report, None if screens and screens.only_counts else screens)
    from r1pipe.data.reasoning_gym import ReasoningGym

    return ReasoningGym(config)
