"""Looks a stage over before it runs: what `r1pipe doctor` starts, on as many ranks as the stage has here.

It reads a run folder's config.json as the stage's own script would, goes through the checks of
r1pipe/doctor/, and writes findings.json there: a list of {name, status, value, remedy}. Nothing that it
trains is kept.

    r1pipe doctor stage=grpo
    python stages/doctor.py RUN_FOLDER
"""

import sys
from dataclasses import asdict

from r1pipe.config import StageConfig
from r1pipe.doctor import Context, examine
from r1pipe.doctor.context import limits
from r1pipe.runs.files import write_json
from r1pipe.train.run import open_run


def main(folder: str) -> None:
    with open_run(folder, StageConfig) as run:
        found = examine(Context(run, limits()))
        if run.rank == 0:
            write_json(run.folder.path / "findings.json", [asdict(finding) for finding in found])


if __name__ == "__main__":
    main(sys.argv[1])
