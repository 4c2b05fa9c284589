"""`r1pipe doctor`: runs stages/doctor.py on a stage's config, and adds the checks that need no torch."""

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from r1pipe.cli import findings
from r1pipe.config import RunConfig, to_mapping
from r1pipe.config.compose import compose
from r1pipe.core.errors import CheckpointError, EnvironmentProblem
from r1pipe.core.paths import RunFolder
from r1pipe.core.redaction import publishable, without_login
from r1pipe.launch import command as launch
from r1pipe.launch import parents
from r1pipe.launch.job import failure
from r1pipe.plan import footprint
from r1pipe.runs import machine
from r1pipe.runs.files import write_json
from r1pipe.runs.findings import FAIL, PASS, Finding
from r1pipe.runs.servers import check_servers
from r1pipe.tracking.store import check_server_answers, is_server, store_uri


def doctor(overrides: list[str], as_json: bool) -> int:
    """Examine one stage and show the findings: 0, or 1 if a check failed. Raises ConfigError and the like."""
    began = time.monotonic()
    config = compose(overrides).config
    here = [check_launcher(config), check_tracker(config), *check_asked(config)]
    here += [Finding(f"{what}, at most", PASS, needs) for what, needs in footprint.estimates(config).items()]
    try:
        config = parents.with_parents(config)
    except CheckpointError as error:
        if config.parent is not None:
            raise
        found = [Finding("parent", FAIL, "missing, so little can be checked", str(error))]
    else:
        code, found = examined(config, on_ranks=config.engine.ranks > 1 and here[0].status == PASS)
        if code:
            return code
    seconds = time.monotonic() - began
    if as_json:
        print(findings.as_json(config.stage.name, seconds, [*found, *here]))
    else:
        findings.show(config.stage.name, seconds, [*found, *here])
    return 1 if findings.failed([*found, *here]) else 0


def examined(config: RunConfig, on_ranks: bool) -> tuple[int, list[Finding]]:
    """The exit code of stages/doctor.py on this config, and what it found.

    `on_ranks`: on all ranks of this machine, since their communication can fail too.
    """
    folder = Path(tempfile.mkdtemp(prefix="r1pipe-doctor-"))
    run = RunFolder(folder / f"{config.stage.name}-doctor")
    crashed = False
    try:
        run.log.mkdir(parents=True)
        write_json(run.config, publishable(to_mapping(config)), indent=2)
        with (run.log / "launcher.txt").open("wb") as log:
            if on_ranks:
                code = launch.on_ranks("doctor.py", config, run, log)
            else:
                code = launch.script("doctor.py", [str(run.path)], log)
        findings_file = run.path / "findings.json"
        if code or not findings_file.exists():  # DeepSpeed's launcher returns 0 if its child was killed
            crashed = not run.error.exists()  # then its log is the only evidence
            print(failure(run, code or 1), file=sys.stderr)
            return code or 1, []
        return 0, [Finding(**row) for row in json.loads(findings_file.read_text(encoding="utf-8"))]
    finally:
        if not crashed:
            shutil.rmtree(folder)


def check_launcher(config: RunConfig) -> Finding:
    """DeepSpeed's launcher, a compiler, the hostfile, what FP8 needs."""
    try:
        return Finding("launcher", PASS, machine.find_launcher(config.engine))
    except EnvironmentProblem as error:
        return Finding("launcher", FAIL, "cannot start a job", str(error))


def check_asked(config: RunConfig) -> list[Finding]:
    """The servers that the stage asks answer; nothing where it asks none."""
    try:
        asked = check_servers(config)
    except EnvironmentProblem as error:
        return [Finding("servers", FAIL, "one does not answer", str(error))]
    return [Finding("servers", PASS, f"{', '.join(asked)}: each answers")] if asked else []


def check_tracker(config: RunConfig) -> Finding:
    """The tracking server answers, or the folder of the database can be written."""
    if not config.tracking.enabled:
        return Finding("tracker", PASS, "off")
    uri = store_uri(config.root, config.tracking.uri)
    try:
        check_server_answers(uri)
    except EnvironmentProblem as error:
        return Finding("tracker", FAIL, "does not answer", str(error))
    place = machine.existing(Path(config.root))
    if not is_server(uri) and not os.access(place, os.W_OK):
        return Finding("tracker", FAIL, without_login(uri), f"{place} cannot be written; give root=DIR")
    return Finding("tracker", PASS, without_login(uri))
