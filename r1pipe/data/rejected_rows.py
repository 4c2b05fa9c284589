"""What happens to rows that cannot be used: the file is refused, or they are set aside with the reasons."""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from r1pipe.config import DataConfig
from r1pipe.core.errors import DataError
from r1pipe.core.paths import SET_ASIDE
from r1pipe.data.reading import BadRow


class RejectedRows:
    """The bad rows of a data set. `folder`: where they are written; `report` takes a line about them."""

    def __init__(self, folder: Path | None = None, report: Callable[[str], None] | None = None):
        self._folder, self.report = folder, report
        self.rows: list[BadRow] = []

    def add(self, bad: Sequence[BadRow], total: int, config: DataConfig) -> None:
        """The bad rows of one file of `total` rows, in their order.

        Raises DataError with data.bad_rows=refuse, and where there are more than data.max_bad_rows.
        """
        first = bad[0]
        if config.bad_rows == "refuse":
            raise DataError(first.reason)
        counted = f"{len(bad):,} of {total:,} rows of {first.path}"
        if len(bad) > config.max_bad_rows * total:
            limit = f"data.max_bad_rows={config.max_bad_rows:g}"
            raise DataError(f"{counted} cannot be used, more than {limit}; the first: {first.reason}")
        self.rows += bad
        place = ""
        if self._folder:
            self._write(self._folder / SET_ASIDE)
            place = f" (all in {self._folder / SET_ASIDE})"
        if self.report:
            self.report(f"{counted} set aside{place}; the first: {first.reason}")

    def _write(self, path: Path) -> None:
        """Every bad row so far; atomic, since every rank writes the same file."""
        lines = [
            {"file": str(row.path), "line": row.number, "reason": row.reason, "text": row.text}
            for row in self.rows
        ]
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        temporary.replace(path)
