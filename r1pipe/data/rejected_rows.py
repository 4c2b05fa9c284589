"""What becomes of rows that cannot be used: refused, or set aside with the reasons."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from r1pipe.config import DataConfig
from r1pipe.core.errors import DataError
from r1pipe.core.paths import SET_ASIDE
from r1pipe.data.reading import BadRow

SETS_ASIDE = "set_aside"


class RejectedRows:
    """The bad rows of a data set's files. `folder`: where they are written; `say` takes a line about them."""

    def __init__(self, folder: Path | None = None, say: Callable[[str], None] | None = None):
        self._folder, self.say = folder, say
        self.rows: list[BadRow] = []

    def take(self, bad: Sequence[BadRow], total: int, config: DataConfig) -> None:
        """The bad rows of one file of `total` rows, in their order.

        Raises DataError with data.bad_rows=refuse, and where there are more than data.max_bad_rows.
        """
        first = bad[0]
        if config.bad_rows != SETS_ASIDE:
            raise DataError(first.reason)
        counted = f"{len(bad):,} of {total:,} rows of {first.path}"
        if len(bad) > config.max_bad_rows * total:
            raise DataError(
                f"{counted} cannot be used, more than data.max_bad_rows={config.max_bad_rows:g}; the first: "
                f"{first.reason}"
            )
        self.rows += bad
        place = f" (all in {self._write()})" if self._folder else ""
        if self.say:
            self.say(f"{counted} set aside{place}; the first: {first.reason}")

    def _write(self) -> Path:
        """All of them so far, whole or not at all: every rank writes the same."""
        assert self._folder
        path = self._folder / SET_ASIDE
        lines = [
            {"file": str(one.path), "line": one.number, "reason": one.reason, "text": one.text}
            for one in self.rows
        ]
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        temporary.replace(path)
        return path


NOWHERE = RejectedRows()
