"""A house for tests of the command line: stages that are all `fake_stage.py`, a bundled base of a few bytes,
and in place of DeepSpeed's launcher (four seconds a start) a script that takes the same arguments."""

import sys
from pathlib import Path

import pytest
from fake_stage import publish

from r1pipe.cli import commands as cli
from r1pipe.config.compose import compose
from r1pipe.launch import command as launch
from r1pipe.runs import machine
from r1pipe.runs.lineage import lookup

# Takes the launcher's arguments; like it, it forgets the code of a child that was killed (137 = SIGKILL).
LAUNCHER = f"""#!/bin/sh
test "$1 $2 $4" = "--no_local_rank --num_accelerators --master_port" || exit 9
{sys.executable} "$6" "$7"
code=$?
test $code = 137 && exit 0
exit $code
"""


class House:
    """`root` for run folders; `call("run", "stage=grpo")` is the command line."""

    def __init__(self, root: Path):
        self.root = root

    def call(self, *words: str) -> int:
        """The exit code of `r1pipe WORDS root=... tracking=none`."""
        command, *rest = words
        settings = [f"root={self.root}", "tracking=none"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["r1pipe", command, *rest, *settings])
            with pytest.raises(SystemExit) as ended:
                cli.main()
        return int(ended.value.code or 0)

    def runs(self, stage: str = "") -> list[Path]:
        """Oldest first."""
        found = [path.parent for path in self.root.glob(f"{stage}*/config.json")]
        return sorted(found, key=lambda run: run.stat().st_ctime)


def build_house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    launcher = tmp_path / "deepspeed"
    launcher.write_text(LAUNCHER)
    launcher.chmod(0o755)
    stages, content = tmp_path / "stages", tmp_path / "content"
    stages.mkdir()
    fake = Path(__file__).with_name("fake_stage.py").read_text()
    for name in ["pretrain", "evaluate", "sft", "grpo", "rejection_sft", "reward_model", "distill"]:
        (stages / f"{name}.py").write_text(fake)
    publish(content / "base", compose([]).config.model, "weights of the bundled base", "pretrain")
    monkeypatch.setattr(machine, "find_launcher", lambda engine: str(launcher))
    monkeypatch.setattr(launch, "stages_dir", lambda: stages)
    monkeypatch.setattr(lookup, "content_dir", lambda: content)
    monkeypatch.delenv("FAKE", raising=False)
    return House(tmp_path / "runs")
