"""`r1pipe judge`: runs stages/judge.py on a model, and shows what its verdicts are worth."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from r1pipe.config import RunConfig, to_mapping
from r1pipe.config.compose import compose
from r1pipe.config.groups import read
from r1pipe.core.paths import RunFolder
from r1pipe.core.redaction import publishable
from r1pipe.launch import command as launch
from r1pipe.launch import parents
from r1pipe.launch.job import failure
from r1pipe.runs import judge_quality as judges
from r1pipe.runs import lineage
from r1pipe.runs.files import write_json
from r1pipe.runs.servers import check_servers

SETTINGS = "judge_prompts/part/measurement"


def judge(model: str, overrides: list[str], asked: dict[str, int | None], as_json: bool) -> int:
    """Measure a judge and show the figures: 0; 1 if it is beyond a bound of stage.judge. Raises ConfigError
    and the like."""
    config = config_of(model, overrides)
    check_servers(config)
    folder = RunFolder(judges.folder_of(config))
    folder.create()
    write_json(folder.config, publishable(to_mapping(config)), indent=2)
    given = {name: count for name, count in asked.items() if count is not None}
    write_json(folder.path / "measurement.json", {**read(SETTINGS), **given})
    folder.error.unlink(missing_ok=True)
    code = launch.script("judge.py", [str(folder.path)])
    quality = judges.quality_of(folder.path)
    if code or quality is None:
        print(failure(folder, code or 1), file=sys.stderr)
        return code or 1
    settings = judges.judge_of(config)
    assert settings is not None
    beyond = [
        line
        for kind in quality["kinds"]
        for line in judges.shortfalls(kind, quality["kinds"][kind], settings)
    ]
    if as_json:
        print(json.dumps({**quality, "beyond": beyond}, ensure_ascii=False, indent=1))
    else:
        print(*described(quality, folder.path), sep="\n")
        print(*[f"weak  {line}" for line in beyond] or ["within every bound of stage.judge"], sep="\n")
    return 1 if beyond else 0


def config_of(model: str, overrides: list[str]) -> RunConfig:
    """The config of a stage that only measures, on one rank of this machine, with this judge."""
    config = compose([*overrides, "stage=base", f"judge={json.dumps(model)}"]).config
    found = parents.checkpoint_named("judge", config.judge, lineage.SearchPath.of(config))
    engine = replace(config.engine, ranks=1, launcher="local", hostfile=None, slurm=None)
    return replace(config, judge_from=found, engine=engine)


def described(quality: judges.Quality, folder: Path) -> list[str]:
    """The figures, a line for each kind, and what they have cost."""
    who: dict[str, Any] = quality["judge"]
    lines = [f"judge {who['name']} ({who['version'][:12]}), prompts {who['prompts']}"]
    lines += [judges.describe(kind, figures) for kind, figures in quality["kinds"].items()]
    price = f", {who['usd']:.2f} USD" if who["usd"] else ""
    tokens = who["prompt_tokens"] + who["completion_tokens"]
    lines.append(f"{who['requests']:,} requests, {tokens:,} tokens, {who['seconds']:.0f} s{price}")
    return [*lines, f"{folder / judges.QUALITY}"]
