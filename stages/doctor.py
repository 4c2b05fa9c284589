"""Checks a stage before it runs, on its ranks on this machine: what `r1pipe doctor` starts.

Reads a run folder's config.json, runs the checks of r1pipe/doctor/, and writes findings.json there: a list of
{name, status, value, remedy}. Keeps nothing that it trains.

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
        findings = examine(Context(run, limits()))
        if run.rank == 0:
            write_json(run.folder.path / "findings.json", [asdict(finding) for finding in findings])


if __name__ == "__main__":
    main(sys.argv[1])
