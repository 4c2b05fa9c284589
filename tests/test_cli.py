"""The command line as a user meets it."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from fakes import House

from r1pipe.cli import commands as cli
from r1pipe.cli import options, verbs
from r1pipe.config import groups
from r1pipe.core.paths import stages_dir
from r1pipe.launch import job as launch
from r1pipe.model.weights import PRECISIONS

VERBS = [
    "run",
    "doctor",
    "reproduce",
    "config",
    "eval",
    "generate",
    "chat",
    "compare",
    "report",
    "samples",
    "lineage",
    "sync",
    "score",
    "export",
    "import",
    "ui",
]


def shell(*words: str, **variables: str) -> subprocess.CompletedProcess:
    line = [sys.executable, "-c", "from r1pipe.cli.commands import main; main()", *words]
    return subprocess.run(line, capture_output=True, text=True, env={**os.environ, **variables}, check=False)


def test_help_lists_every_verb_and_imports_nothing_slow() -> None:
    line = "import sys, r1pipe.cli; print({'hydra', 'torch', 'mlflow', 'omegaconf'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", line], capture_output=True, text=True).stdout == "set()\n"
    helped = shell("--help")
    assert helped.returncode == 0
    assert [verb for verb in VERBS if f"  {verb}" not in helped.stdout] == []


def test_config_needs_nothing_slow_either() -> None:
    line = (
        "import sys; sys.argv = ['r1pipe', 'config', 'stage=grpo']\nfrom r1pipe import cli\n"
        "try: cli.main()\nfinally: print({'torch', 'mlflow', 'rich', 'deepspeed'} & sys.modules.keys())"
    )
    shown = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True).stdout
    assert shown.splitlines()[-1] == "set()"
    assert "stage.optim.lr=0.0003" in shown and "# conf/recipe/laptop.yaml" in shown


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["runn"], "Did you mean 'run'?"),
        (["run", "--fres"], "--fresh"),
        (["run"], "which stage? give stage=NAME"),
        (["run", "stage=grop"], "did you mean grpo?"),
        (["reproduce", "stage=grpo"], "drop stage=grpo"),
        (["reproduce", "recipe=laptopp"], "did you mean laptop?"),
        (["lineage", "colt_start"], "did you mean cold_start?"),
        (["generate", "nowhere", "why?"], "no checkpoint nowhere"),
        (["import", "theirs", "--name", "a/b"], "must be a name, not a path"),
        (["import", "theirs", "--dtype", "int4"], "'int4' is not one of 'float32', 'bfloat16', 'fp8'"),
        (["export", "grpo", "out", "--dtype", "int4"], "Invalid value for '--dtype'"),
        (["export", "grpo", "out"], "stage grpo has no finished run"),
        (["compare", "nowhere"], "no run nowhere"),
        (["report"], "no finished run"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    house: House, capsys: pytest.CaptureFixture, words: list[str], told: str
) -> None:
    assert house.call(*words) == 2
    out, err = capsys.readouterr()
    assert told in err and err.count("\n") == 1 and "Traceback" not in err + out


@pytest.mark.parametrize(
    ("script", "words", "told"),
    [
        ("export", ["grpo", "out", "--dtype", "int4"], ["--dtype", "'int4'", *PRECISIONS]),
        ("import_weights", ["theirs", "mine", "--dtype", "int4"], ["--dtype", "'int4'", *PRECISIONS]),
        ("generate", ["grpo", "why?", "--seed", "one"], ["--seed", "'one'"]),
        ("generate", [], ["checkpoint"]),
    ],
)
def test_a_wrong_word_to_a_script_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    script: str,
    words: list[str],
    told: list[str],
) -> None:
    path = str(stages_dir() / f"{script}.py")
    monkeypatch.setattr(sys, "argv", [path, *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(path, run_name="__main__")
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and err.count("\n") == 1
    assert [word for word in told if word not in err] == []


def test_the_command_line_knows_the_precisions_that_weights_can_have() -> None:
    assert get_args(options.Precision) == tuple(PRECISIONS)


def test_a_bug_is_not_dressed_up_as_a_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(overrides: list[str]) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(verbs, "composed", broken)
    monkeypatch.setattr(sys, "argv", ["r1pipe", "lineage", "grpo"])
    with pytest.raises(KeyError):
        cli.main()


def test_compare_prints_json_for_scripts(house: House, capsys: pytest.CaptureFixture) -> None:
    house.call("run", "stage=base")
    house.call("run", "stage=base", "seed=1")
    house.call("run", "stage=cold_start", "seed=1")
    capsys.readouterr()
    assert house.call("compare", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(row["stage"], row["seed"]) for row in rows} == {("base", 0), ("base", 1), ("cold_start", 1)}
    assert {"pass_at_1", "samples", "wall_s", "run_id", "run_dir"} <= set(rows[0])
    assert house.call("compare", "--json", "seed=1") == 0
    assert {row["seed"] for row in json.loads(capsys.readouterr().out)} == {1}
    one = house.runs("cold_start")[0].name
    assert house.call("compare", "--json", one) == 0
    assert [row["run_id"] for row in json.loads(capsys.readouterr().out)] == [one]


def test_generate_and_export_hand_the_checkpoint_to_their_scripts(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(launch, "script", lambda name, words: called.append([name, *words]) or 5)
    house.call("run", "stage=base")
    checkpoint = str(house.runs()[0] / "checkpoints" / "step-1")
    assert house.call("generate", "base", "if x=3, what is 2x?", "--seed", "4", "--temperature", "0") == 5
    assert called.pop() == [
        "generate.py", "--temperature=0.0", "--seed=4", "--", checkpoint, "if x=3, what is 2x?"
    ]  # fmt: skip
    assert house.call("chat", "base") == 5
    assert called.pop() == ["generate.py", "--seed=0", "--chat", "--", checkpoint]
    assert house.call("export", "base", "out") == 5
    assert called.pop() == ["export.py", "--shard-gb=5.0", "--", checkpoint, "out"]
    assert house.call("export", "base", "out", "--dtype", "fp8", "--shard-gb", "1") == 5
    assert called.pop() == ["export.py", "--dtype=fp8", "--shard-gb=1.0", "--", checkpoint, "out"]
    assert house.call("import", "theirs", "--name", "mine") == 5
    target = str(house.root / "imported" / "mine")
    assert called.pop() == ["import_weights.py", "--shard-gb=5.0", "--", "theirs", target]


@pytest.mark.parametrize(
    ("words", "at", "offered"),
    [
        ("r1pipe run stage = gr", 4, ["grpo"]),  # as bash splits stage=gr
        ("r1pipe run model = ", 3, groups.options("model")),
        ("r1pipe run stage.optim.l", 2, ["stage.optim.lr="]),
        ("r1pipe lineage cold", 2, ["cold_start"]),
        ("r1pipe repr", 1, ["reproduce"]),
    ],
)
def test_bash_completes(words: str, at: int, offered: list[str]) -> None:
    variables = {"_R1PIPE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(at)}
    with_name = "import sys; sys.argv[0] = 'r1pipe'; from r1pipe.cli.commands import main; main()"
    shown = subprocess.run(
        [sys.executable, "-c", with_name], capture_output=True, text=True, env={**os.environ, **variables}
    )
    assert shown.stdout.split() == offered


def test_zsh_completes_whole_words() -> None:
    variables = {"_R1PIPE_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "r1pipe run stage=gr"}
    with_name = "import sys; sys.argv[0] = 'r1pipe'; from r1pipe.cli.commands import main; main()"
    shown = subprocess.run(
        [sys.executable, "-c", with_name], capture_output=True, text=True, env={**os.environ, **variables}
    )
    assert "stage=grpo" in shown.stdout


def test_ui_without_a_store_says_what_makes_one(house: House, capsys: pytest.CaptureFixture) -> None:
    assert house.call("ui") == 2
    assert "no MLflow store" in capsys.readouterr().err


def test_a_root_without_runs_is_no_success_of_sync(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["r1pipe", "sync", f"root={tmp_path}"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2 and "no runs under" in capsys.readouterr().err
