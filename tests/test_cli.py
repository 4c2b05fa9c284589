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
from r1pipe.cli import commands_on_runs
from r1pipe.config import groups, script_options
from r1pipe.config.script_options import (
    DataOptions,
    ExportOptions,
    GenerateOptions,
    ImportOptions,
    ScoreOptions,
)
from r1pipe.core.errors import ConfigError
from r1pipe.core.paths import stages_dir
from r1pipe.launch import command as launch
from r1pipe.model.weights import PRECISIONS

COMMANDS = [
    "run",
    "doctor",
    "reproduce",
    "config",
    "eval",
    "data",
    "generate",
    "chat",
    "compare",
    "report",
    "samples",
    "lineage",
    "sync",
    "prune",
    "score",
    "export",
    "import",
    "ui",
]


def shell(*words: str, **variables: str) -> subprocess.CompletedProcess:
    line = [sys.executable, "-c", "from r1pipe.cli.commands import main; main()", *words]
    return subprocess.run(line, capture_output=True, text=True, env={**os.environ, **variables}, check=False)


def test_help_lists_every_command_and_imports_nothing_slow() -> None:
    line = "import sys, r1pipe.cli; print({'hydra', 'torch', 'mlflow', 'omegaconf'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", line], capture_output=True, text=True).stdout == "set()\n"
    helped = shell("--help")
    assert helped.returncode == 0
    assert [command for command in COMMANDS if f"  {command}" not in helped.stdout] == []


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
        (["runn"], "Did you mean 'run'"),
        (["run", "--fres"], "--fresh"),
        (["run"], "which stage? give stage=NAME"),
        (["run", "stage=grop"], "did you mean grpo?"),
        (["reproduce", "stage=grpo"], "drop stage=grpo"),
        (["reproduce", "recipe=laptopp"], "did you mean laptop?"),
        (["lineage", "colt_start"], "did you mean cold_start?"),
        (["generate", "nowhere", "why?"], "no checkpoint nowhere"),
        (["generate", "bundeld", "why?"], "no checkpoint bundeld; did you mean bundled?"),
        (["import", "theirs", "--name", "a/b"], "must be a name, not a path"),
        (["import", "theirs", "--dtype", "int4"], "'int4' is not one of 'float32', 'bfloat16', 'fp8'"),
        (["export", "grpo", "out", "--dtype", "int4"], "Invalid value for '--dtype'"),
        (["export", "grpo", "out"], "stage grpo has no finished run"),
        (["compare", "nowhere"], "no run nowhere"),
        (["data", "my.jsonl", "data=world"], "data.path is not used by data=world"),
        (["data", "my.jsonl", "--checkpoint", "nowhere"], "no checkpoint nowhere"),
        (["report"], "no finished run"),
        (["ui", "--port", "80000"], "'--port'"),
        (["generate", "bundled", "why?", "--max-tokens", "0"], "--max-tokens=0 must be 1 or more"),
        (["generate", "bundled", "why?", "--temperature", "nan"], "--temperature=nan is not finite"),
        (["generate", "bundled", "\udcff?"], "is not valid UTF-8"),
        (["config", "lr=1e-4"], "did you mean stage.optim.lr?"),
        (["config", "optim.lr=1e-4"], "did you mean stage.optim.lr?"),
        (["config", "temperature=1"], " or stage.eval.temperature or "),
        (["prune"], "which runs?"),
        (["prune", "gropo"], "did you mean grpo?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    house: House, capsys: pytest.CaptureFixture, words: list[str], told: str
) -> None:
    assert house.call(*words) == 2
    out, err = capsys.readouterr()
    assert told in err and err.count("\n") == 1 and "Traceback" not in err + out


EXPORT = {"checkpoint": "grpo", "folder": "out", "dtype": None, "shard_gb": 5.0}


@pytest.mark.parametrize(
    ("script", "options", "told"),
    [
        ("export", {**EXPORT, "dtype": "int4"}, ["--dtype=int4", *PRECISIONS]),
        ("export", {**EXPORT, "shard_gb": "5"}, ["--shard-gb=5", "number"]),
        ("export", {**EXPORT, "more": 1}, ["--more is no"]),
        ("import_weights", {"folder": "theirs", "target": "mine", "dtype": None}, ["--shard-gb"]),
        ("generate", None, ["GenerateOptions"]),
        ("score", "{", ["JSON"]),
    ],
)
def test_a_wrong_option_of_a_script_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
    script: str,
    options: dict | str | None,
    told: list[str],
) -> None:
    path, file = str(stages_dir() / f"{script}.py"), tmp_path / "options.json"
    file.write_text(options if isinstance(options, str) else json.dumps(options))
    monkeypatch.setattr(sys, "argv", [path] if options is None else [path, str(file)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(path, run_name="__main__")
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and err.count("\n") == 1 and err.startswith("r1pipe: ")
    assert [word for word in told if word not in err] == []


def test_the_command_line_knows_the_precisions_that_weights_can_have() -> None:
    assert get_args(script_options.Precision) == tuple(PRECISIONS)


def test_a_bug_is_not_dressed_up_as_a_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(overrides: list[str]) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(commands_on_runs, "composed", broken)
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


def test_a_file_name_that_is_not_utf_8_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"b\\udcffd.* is not valid UTF-8; convert it, or rename"):
        script_options.write(ScoreOptions(Path("b\udcffd.jsonl"), "format", "en"), tmp_path / "options.json")


def test_the_commands_hand_their_options_to_their_scripts(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[str, object]] = []
    kinds = {
        "data.py": DataOptions,
        "generate.py": GenerateOptions,
        "score.py": ScoreOptions,
        "export.py": ExportOptions,
        "import_weights.py": ImportOptions,
    }

    def script(name: str, words: list[str]) -> int:
        called.append((name, script_options.read(kinds[name], [name, *words])))
        return 5

    monkeypatch.setattr(launch, "script", script)
    house.call("run", "stage=base")
    checkpoint = house.runs()[0] / "checkpoints" / "step-1"
    question = "if x=3, what is 2x?"
    assert house.call("generate", "base", question, "--seed", "4", "--temperature", "0") == 5
    expected = GenerateOptions(checkpoint, [question], False, False, 0.0, None, None, 4)
    assert called.pop() == ("generate.py", expected)
    assert house.call("chat", "base", "--max-tokens", "7") == 5
    assert called.pop() == ("generate.py", GenerateOptions(checkpoint, [], True, False, None, None, 7, 0))
    assert house.call("data", "my, rows.jsonl", "--json", "data.bad_rows=set_aside") == 5
    name, options = called.pop()
    assert name == "data.py" and isinstance(options, DataOptions)
    assert (options.data.name, options.data.path, options.as_json) == ("files", "my, rows.jsonl", True)
    assert (options.checkpoint, options.data.bad_rows) == (None, "set_aside")
    assert house.call("data", 'a\\b ${x} "c".jsonl') == 5
    name, options = called.pop()
    assert isinstance(options, DataOptions) and options.data.path == 'a\\b ${x} "c".jsonl'
    assert house.call("data", "folder", "data=gsm8k", "--checkpoint", "base") == 5
    name, options = called.pop()
    assert isinstance(options, DataOptions) and options.data.name == "gsm8k"
    assert options.checkpoint == checkpoint
    assert house.call("export", "base", "out") == 5
    assert called.pop() == ("export.py", ExportOptions(checkpoint, Path("out"), None, 5.0))
    assert house.call("export", "base", "out", "--dtype", "fp8", "--shard-gb", "1") == 5
    assert called.pop() == ("export.py", ExportOptions(checkpoint, Path("out"), "fp8", 1.0))
    assert house.call("import", "theirs", "--name", "mine") == 5
    target = house.root / "imported" / "mine"
    assert called.pop() == ("import_weights.py", ImportOptions(Path("theirs"), target, None, 5.0))
    monkeypatch.setattr(sys, "argv", ["r1pipe", "score", "rows.jsonl", "--reward", "language"])
    with pytest.raises(SystemExit):
        cli.main()
    assert called.pop() == ("score.py", ScoreOptions(Path("rows.jsonl"), "language", "en", False))


def test_a_reader_who_has_left_is_no_error() -> None:
    for words in (["config", "stage=grpo"], ["--help"], ["config", "stage=grpo", "--help-keys"]):
        line = [sys.executable, "-c", "from r1pipe.cli.commands import main; main()", *words]
        process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 1
        process.stderr.close()


@pytest.mark.parametrize("locale", [{"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "POSIX", "PYTHONUTF8": "0"}])
def test_text_is_utf_8_whatever_the_locale_is(locale: dict[str, str]) -> None:
    program = "import sys; from r1pipe.core import terminal; terminal.run(lambda: print(sys.stdin.read()))"
    env = {**os.environ, "PYTHONCOERCECLOCALE": "0", **locale}
    line = [sys.executable, "-c", program]
    done = subprocess.run(line, input="用".encode(), capture_output=True, env=env, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (0, b"", "用\n".encode())
    line = [sys.executable, "-c", "from r1pipe.cli.commands import main; main()", "config", "用=1"]
    done = subprocess.run(line, capture_output=True, env=env, check=False)
    assert done.returncode == 2 and done.stderr.startswith(b"r1pipe: ") and done.stderr.count(b"\n") == 1


def test_config_says_what_each_key_means(capsys: pytest.CaptureFixture) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(sys, "argv", ["r1pipe", "config", "stage=grpo", "stage.algorithm=ppo", "--help-keys"])
        cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("    ") and len(line) > 100] == []
    for key, meaning in {
        "stage.optim.lr=": "peak learning rate",
        "stage.ppo.value_clip=": "furthest move of a value in a step",
        "tripwires.wires.kl.limit=": "the number that must not be passed",  # in a mapping of groups
        "stage.rewards.weights.accuracy=": "reward name -> weight",  # by the mapping it is in
        "stage.keep=": "newest checkpoints kept",  # of a base class
    }.items():
        place = next(i for i, line in enumerate(lines) if line.startswith(key))
        assert lines[place + 1].strip().startswith(meaning)
    with_value = [i for i, line in enumerate(lines) if "  # " in line]
    assert [lines[i] for i in with_value if not lines[i + 1 : i + 2] or "  # " in lines[i + 1]] == []


def test_published_weights_as_a_parent_point_to_import(
    house: House, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    theirs = tmp_path / "DeepSeek-V2-Lite"
    theirs.mkdir()
    (theirs / "config.json").write_text(json.dumps({"model_type": "deepseek_v2"}))
    for words in (["run", "stage=cold_start", f"parent={theirs}"], ["export", str(theirs), "out"]):
        assert house.call(*words) == 2
        err = capsys.readouterr().err
        assert "model_type deepseek_v2" in err and f"r1pipe import {theirs}\n" in err and err.count("\n") == 1


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
