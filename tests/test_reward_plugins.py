"""Custom rewards: functions in worker processes, entry points, servers; a failure is never a wrong answer."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from custom_rewards import LIMITS, PROMPT, completions, rewards_config, scores
from fake_servers import replying
from rl_runs import go, grpo, metrics_of
from tiny_runs import tiny_run

from r1pipe.config import script_options
from r1pipe.config.compose import compose
from r1pipe.config.rl import custom_rewards_of
from r1pipe.config.script_options import ScoreOptions
from r1pipe.core.errors import ConfigError, EnvironmentProblem
from r1pipe.core.paths import stages_dir
from r1pipe.core.types import Score, Status
from r1pipe.rewards import custom as custom_module
from r1pipe.rewards.custom import CustomRewards
from r1pipe.runs.lineage.ancestors import CheckedCheckpoint, check_rewards

FAILED = Status.VERIFIER_FAILED
Use = Callable[..., CustomRewards]


def wait_for_end(pid: int) -> None:
    """For processes that end by themselves only after 1000 s."""
    with suppress(psutil.NoSuchProcess):
        while psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)


@pytest.fixture(scope="module")
def misbehaving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CustomRewards]:
    path = tmp_path_factory.mktemp("plugins") / "mine.py"
    path.write_text(MISBEHAVING)
    custom = CustomRewards(rewards_config(["mine", "group"], plugins=[str(path)]))
    yield custom
    custom.close()


@pytest.fixture
def use(tmp_path: Path) -> Iterator[Use]:
    """The rewards of a plugin with this code, or of servers; each named reward has a weight."""
    made = []

    def make(*names: str, code: str = "", parts: int = 1, **changed: Any) -> CustomRewards:
        if code:
            (tmp_path / "mine.py").write_text(code)
            changed["plugins"] = [str(tmp_path / "mine.py")]
        config = rewards_config(names, **changed)
        made.append(CustomRewards(config, parts))
        return made[-1]

    yield make
    for custom in made:
        custom.close()


# --- functions

RIGHT = """
from r1pipe.core.types import Completion, Message, Prompt, Score
from r1pipe.rewards import summary_of

calls = 0

def value(prompt, completion):
    assert isinstance(prompt, Prompt) and isinstance(completion, Completion)
    assert prompt.checker == {"pair": (1, 2)} and prompt.context == (Message("system", "Be brief."),)
    assert (completion.tokens, completion.finish_reason) == ([7] * len(completion.text), "stop")
    answers = {"float": 0.5, "bool": True, "int": -2, "score": Score(0.25, detail="why"), "none": None}
    return answers[summary_of(completion.text)]

def counted(prompt, completion):
    global calls
    calls += 1
    return calls

def ranked(prompt, completions):
    order = sorted(completions, key=lambda completion: len(completion.tokens))
    return [None if c.text == "none" else order.index(c) for c in completions]
"""


def test_a_function_gets_prompt_and_completion_and_gives_a_number_a_score_or_nothing(use: Use) -> None:
    custom = use("value", code=RIGHT)
    found = scores(custom, "float", "<think>\nx\n</think>\n\nbool", "int", "score", "none", name="value")
    assert found == [Score(0.5), Score(1.0), Score(-2.0), Score(0.25, detail="why"), None]


def test_a_function_of_completions_gets_the_whole_group_and_state_is_kept(use: Use) -> None:
    custom = use("ranked", "counted", code=RIGHT)
    groups = [(PROMPT, completions("xxx", "x", "xx")), (PROMPT, completions("none", "x"))]
    assert custom.score("ranked", groups) == [[Score(2.0), Score(0.0), Score(1.0)], [None, Score(0.0)]]
    assert scores(custom, *"abcde", name="counted") == [Score(n) for n in (1.0, 2.0, 3.0, 4.0, 5.0)]
    assert scores(custom, "a", name="counted") == [Score(6.0)]


def test_a_function_sees_the_environment_but_is_no_rank_of_the_job(
    use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID", "MY_API_KEY"):
        monkeypatch.setenv(name, "4")
    code = "import os\ndef mine(p, c): return float(os.environ.get(c.text, -1))"
    of_rank = ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
    found = scores(use("mine", code=code), *of_rank, "MY_API_KEY", "OMP_NUM_THREADS")
    assert found == [*[Score(-1.0)] * 4, Score(4.0), Score(1.0)]


def test_results_come_in_order_from_several_processes(use: Use) -> None:
    code = "def mine(prompt, completion): return len(completion.text)"
    custom = use("mine", code=code, plugin_limits=replace(LIMITS, workers=2))
    groups = [(PROMPT, completions(*("x" * (i + j) for j in range(5)))) for i in range(20)]
    expected = [[Score(float(i + j)) for j in range(5)] for i in range(20)]
    assert custom.score("mine", groups) == expected


MISBEHAVING = """
import os, subprocess, sys, time
import numpy

def burns():
    while True:
        pass

def forks():
    if os.fork() == 0:
        return 9.0
    return 1.0

def prints():
    print("not a reply")
    os.write(1, b"nor this\\n")
    subprocess.run(["echo", "nor that"])
    return 1.0

acts = {
    "raises": lambda: 1 / 0,
    "nan": lambda: float("nan"),
    "infinite": lambda: numpy.float32("inf"),
    "text": lambda: "1.0",
    "list": lambda: [1.0],
    "exits": lambda: sys.exit(0),
    "dies": lambda: os.kill(os.getpid(), 9),
    "burns": burns,
    "sleeps": lambda: time.sleep(1000),
    "waits": lambda: subprocess.run(["sleep", "1000"]),
    "eats": lambda: bytearray(2 << 30),
    "prints": prints,
    "reads": lambda: len(sys.stdin.read()),
    "forks": forks,
    "numpy": lambda: numpy.float32(0.5),
}

def mine(prompt, completion):
    return acts[completion.text]() if completion.text in acts else 1.0

def group(prompt, completions):
    given = [mine(prompt, completion) for completion in completions]
    return given[1:] if given[0] == 0 else given
"""


@pytest.mark.parametrize(
    ("act", "detail"),
    [
        ("raises", "ZeroDivisionError: division by zero (mine.py:"),
        ("nan", "nan is no finite number"),
        ("infinite", "inf is no finite number"),
        ("text", "'1.0' is a str, not a number, a Score or None"),
        ("list", "'[1.0]' is a list"),
        ("exits", "the process ended, code 0"),
        ("dies", "the process ended, code -9"),
        ("burns", "more than stage.rewards.plugin_limits.cpu_s=0.5 of processor time"),
        ("sleeps", "asleep for stage.rewards.plugin_limits.sleep_s=2"),
        ("waits", "asleep for stage.rewards.plugin_limits.sleep_s=2"),
        ("eats", "more memory than stage.rewards.plugin_limits.memory_gb=1"),
    ],
)
def test_a_call_that_fails_has_no_verdict_and_the_next_one_has(
    misbehaving: CustomRewards, act: str, detail: str
) -> None:
    before, failed, after = scores(misbehaving, "ok", act, "ok")
    assert before == after == Score(1.0)
    assert failed and failed.status is FAILED and detail in failed.detail


@pytest.mark.parametrize(("act", "value"), [("prints", 1.0), ("reads", 0.0), ("forks", 1.0), ("numpy", 0.5)])
def test_what_a_function_does_beside_does_not_reach_the_protocol(
    misbehaving: CustomRewards, act: str, value: float
) -> None:
    assert scores(misbehaving, "ok", act, act, "ok") == [Score(1.0), Score(value), Score(value), Score(1.0)]


@pytest.mark.parametrize(
    ("act", "detail"),
    [("raises", "division by zero"), ("exits", "code 0"), ("reads", "a list of 2, not a list of 3")],
)
def test_a_group_fails_as_a_whole_and_alone(misbehaving: CustomRewards, act: str, detail: str) -> None:
    groups = [(PROMPT, completions(act, "ok", "ok")), (PROMPT, completions("ok", "ok"))]
    failed, fine = misbehaving.score("group", groups)
    assert len(failed) == 3 and fine == [Score(1.0)] * 2
    assert all(score and score.status is FAILED and detail in score.detail for score in failed)


def test_what_a_lost_call_has_started_ends_with_it(use: Use, tmp_path: Path) -> None:
    noted = tmp_path / "pid"
    code = f"""
import subprocess, time
def mine(prompt, completion):
    child = subprocess.Popen(["sleep", "1000"])
    open({str(noted)!r}, "w").write(str(child.pid))
    while True:
        pass
"""
    [score] = scores(use("mine", code=code), "x")
    assert score and score.status is FAILED
    wait_for_end(int(noted.read_text()))


def test_no_process_outlives_its_job(use: Use, tmp_path: Path) -> None:
    noted, config = tmp_path / "pid", tmp_path / "config.json"
    (tmp_path / "mine.py").write_text(
        "import os, pathlib, time\n"
        f"def mine(p, c): pathlib.Path({str(noted)!r}).write_text(str(os.getpid())), time.sleep(1000)\n"
    )
    rewards = rewards_config(["mine"], plugins=[str(tmp_path / "mine.py")])
    limits = replace(LIMITS, sleep_s=1000.0)
    config.write_text(json.dumps(asdict(replace(rewards, plugin_limits=limits))))
    code = f"""
import json
from r1pipe.config import RewardsConfig
from r1pipe.config.fields import build
from r1pipe.core.types import Completion, Prompt
from r1pipe.rewards.custom import CustomRewards
custom = CustomRewards(build(RewardsConfig, json.load(open({str(config)!r}))))
custom.score("mine", [(Prompt("p", "word", "en", "?"), [Completion([], [], "stop", "x")])])
"""
    job = subprocess.Popen([sys.executable, "-c", code])
    while not noted.exists() or not noted.read_text():
        assert job.poll() is None
        time.sleep(0.01)
    job.kill()
    job.wait()
    wait_for_end(int(noted.read_text()))


def test_beyond_what_may_fail_nothing_more_is_asked(
    use: Use, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(custom_module, "LEAST_LOST", 2)
    calls = tmp_path / "calls"
    code = f"import os\ndef mine(prompt, completion): open({str(calls)!r}, 'a').write('x'), os._exit(1)\n"
    custom = use("mine", code=code, max_failed=0.1)
    found = scores(custom, *["x"] * 15)
    assert len(calls.read_text()) == 3
    assert len(found) == 15 and all(score and score.status is FAILED for score in found)
    calls.write_text("")
    scores(use("mine", code=code, max_failed=0.1, parts=3), *["x"] * 10)  # a tenth of 30 in the whole step
    assert len(calls.read_text()) == 4


def test_a_replaced_process_runs_the_file_as_it_was_at_the_start(use: Use, tmp_path: Path) -> None:
    custom = use("mine", code=MISBEHAVING)
    assert scores(custom, "ok") == [Score(1.0)]
    (tmp_path / "mine.py").write_text("def mine(prompt, completion): return 7.0")
    assert scores(custom, "exits", "ok")[1] == Score(1.0)


def test_torch_and_neighbouring_files_can_be_imported_within_the_default_limits(
    use: Use, tmp_path: Path
) -> None:
    (tmp_path / "neighbour.py").write_text("TEN = 10.0")
    code = "import torch\nfrom neighbour import TEN\ndef mine(p, c): return float(torch.tensor(TEN))"
    assert scores(use("mine", code=code, plugin_limits=grpo().rewards.plugin_limits), "x") == [Score(10.0)]


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import nowhere\ndef mine(p, c): return 1.0", "No module named 'nowhere' \\(mine.py:1\\)"),
        ("mine = 3", "mine in .*mine.py is no function"),
        ("def mine(completions, **rest): return 1.0", "must take \\(prompt, completion\\)"),
        ("def mine(prompt, completion, more): return 1.0", "must take \\(prompt, completion\\)"),
        ("async def mine(prompt, completion): return 1.0", "is async; a reward is a plain function"),
        ("import os\ndef mine(p, c): return 1.0\nos._exit(3)", "the process ended, code 3"),
        ("x = bytearray(2 << 30)\ndef mine(p, c): return 1.0", "memory_gb=1"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_told_in_one_line(use: Use, code: str, problem: str) -> None:
    with pytest.raises(EnvironmentProblem, match=f"mine.py cannot be loaded: .*{problem}"):
        use("mine", code=code).load()


def test_an_installed_entry_point_needs_no_path(
    use: Use, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "site" / "fine_rewards-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fine-rewards\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[r1pipe.rewards]\nfine = fine_rewards:fine\n")
    (info.parent / "fine_rewards.py").write_text("def fine(prompt, completion): return 0.75")
    monkeypatch.syspath_prepend(info.parent)
    custom = use("fine")
    [reward] = custom.rewards
    assert (reward.place, reward.version) == ("fine_rewards:fine", "fine-rewards 1.2")
    assert scores(custom, "x", name="fine") == [Score(0.75)]


# --- what the config says


@pytest.mark.parametrize(
    ("names", "code", "changed", "told"),
    [
        ("mine", "", {}, "weights.mine is no rule reward, nor .*; did you mean cosine?"),
        ("brieff mine", "def mine(p, c): 1\ndef brief(p, c): 1", {}, "did you mean brief?"),
        ("mine", "def other(p, c): 1\ndef _mine(p, c): 1", {}, "no reward that .* names; it has other"),
        ("mine", "def mine(p, c): 1\n\ndef mine(p, c): 2", {}, "mine.py:3: mine is defined twice"),
        ("mine", "x = 1\ndef mine(p, c) return 1", {}, "mine.py:2: .*; correct it"),
        (
            "mine",
            "def mine(p, c): 1\ndef accuracy(p, c): 1",
            {},
            "accuracy is a rule of r1pipe and in .*mine.py",
        ),
        (
            "mine",
            "def mine(p, c): 1",
            {"remote": {"mine": "http://h/"}},
            "mine is in .*mine.py and in http://h/",
        ),
        ("größe", "def größe(p, c): 1", {}, "letters, digits and _ only"),
        ("mine", "", {"plugins": ["/no/such.py"]}, "/no/such.py cannot be read .* give a Python file's path"),
        ("mine", "", {"remote": {"mine": "ftp://h/"}}, "remote.mine=ftp://h/ is no address"),
        ("mine", "", {"remote": {"mine": "http://h:x/"}}, "is no address"),
        ("mine", "", {"remote": {"mine": "http://u:secret@h/"}}, "=http://h/ has a secret in it; .*TOKEN"),
        ("mine", "", {"remote": {"mine": "http://h/?token=abc"}}, r"token=\*\*\* has a secret in it"),
        ("", "", {"remote": {"mine": "http://h/"}}, "remote.mine has no weight"),
    ],
)
def test_a_name_has_one_source_or_is_refused(
    tmp_path: Path, names: str, code: str, changed: dict[str, Any], told: str
) -> None:
    if code:
        (tmp_path / "mine.py").write_text(code, encoding="utf-8")
        changed = changed | {"plugins": [str(tmp_path / "mine.py")]}
    with pytest.raises(ConfigError, match=told) as error:
        custom_rewards_of(rewards_config(names.split(), **changed))
    assert "\n" not in str(error.value) and "secret@" not in str(error.value)


def test_a_file_may_build_on_rules(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("from r1pipe.rewards.accuracy import accuracy\ndef mine(p, c): return accuracy(p, c)\n")
    [found] = custom_rewards_of(rewards_config(["accuracy", "mine"], plugins=[str(path)]))
    assert found.name == "mine"


@pytest.mark.parametrize("plus", ["", "+"])
def test_the_command_line_takes_files_and_servers_without_running_anything(tmp_path: Path, plus: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text("from os.path import join as brief\nmine = 3\nraise SystemExit('this was run')\n")
    composed = compose(
        [
            "stage=grpo",
            "recipe=smoke",
            f"{plus}stage.rewards.plugins=[{path}]",
            f"{plus}stage.rewards.remote={{helper: http://localhost:8000/score}}",
            f"{plus}stage.rewards.weights={{brief: 0.5, helper: 1.0, mine: 0}}",
        ]
    )
    rewards: Any = getattr(composed.config.stage, "rewards")  # noqa: B009
    assert rewards.weights["accuracy"] == 1.0 and rewards.weights["brief"] == 0.5
    assert {reward.name: reward.kind for reward in custom_rewards_of(rewards)} == {
        "brief": "file",
        "helper": "remote",
        "mine": "file",
    }


# --- a run

SHORT = ["stage=grpo", "stage.max_steps=2", "stage.prompts_per_step=2", "stage.group_size=2"]
SHORT += ["stage.minibatches=1", "stage.sampling.max_tokens=4", "stage.rewards.max_failed=0.5"]


def test_a_run_trains_on_custom_rewards_and_says_which(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def mine(p, c): return c.tokens[0] / 1000\ndef ranked(p, completions): return [0.0, 1.0]\n"
    )
    weights = "stage.rewards.weights={accuracy: 0, format: 0, language: 0, mine: 0, ranked: 2.0, helper: 1.0}"
    words = [*SHORT, f"stage.rewards.plugins=[{path}]", weights, "stage.save_every=1"]
    with replying((200, {"scores": [0.25, {"value": 0.75}]})) as server:
        folder = tiny_run(tmp_path / "grpo-s0", *words, f"stage.rewards.remote={{helper: '{server.url}'}}")
        go(folder)
    first, last = metrics_of(folder)
    for metrics in (first, last):
        assert metrics["rewards/ranked/mean"] == 0.5 and metrics["rewards/helper/mean"] == 0.5
        assert metrics["reward"] == pytest.approx(1.5) and metrics["rewards/mine/failed"] == 0.0
        assert 0 < metrics["rewards/mine/mean"] < 10
    record = json.loads((folder / "record.json").read_text())
    sha = record["rewards"]["mine"]["hash"]
    assert record["rewards"] == {
        "mine": {"source": str(path), "hash": sha, "version": None},
        "ranked": {"source": str(path), "hash": sha, "version": None},
        "helper": {"source": server.url, "hash": None, "version": None},
    }
    assert len(sha) == 64 and "history" not in record
    (folder / "record.json").unlink()
    path.write_text(path.read_text() + "# corrected\n")
    checked = CheckedCheckpoint()
    check_rewards(record, checked)
    assert len(checked.notes) == 2 and "is not what was saved" in checked.notes[0]
    go(folder)
    resumed = json.loads((folder / "record.json").read_text())
    assert resumed["rewards"]["mine"]["hash"] != sha
    assert resumed["history"]["changed"] == ["rewards.mine.hash", "rewards.ranked.hash"]
    said = [json.loads(line).get("say", "") for line in (folder / "progress.jsonl").read_text().splitlines()]
    assert [line for line in said if f"rewards.mine.hash: {sha[:12]} -> " in line]


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (
            ["stage.rewards.weights={mine: 1}"],
            "import nowhere\ndef mine(p, c): 1",
            "No module named 'nowhere'",
        ),
        (
            ["stage.rewards.weights={mine: 1}"],
            "def mine(p, c): 1 / 0",
            "mine: verifier_failed (ZeroDivisionError",
        ),
    ],
)
def test_a_run_whose_reward_does_not_work_ends_in_one_line(
    tmp_path: Path, words: list[str], code: str, told: str
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(code)
    folder = tiny_run(tmp_path / "grpo-s0", *SHORT, f"stage.rewards.plugins=[{path}]", *words)
    with pytest.raises(SystemExit) as ended:
        go(folder)
    error = (folder / "error.txt").read_text()
    assert ended.value.code == 2 and told in error and error.count("\n") == 1


# --- r1pipe score, and the example in the docs


def scored(folder: Path, reward: str, rows: list[dict], *plugins: Path) -> tuple[int, list[dict], str]:
    file, options = folder / "rows.jsonl", folder / "options.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    script_options.write(ScoreOptions(file, reward, "en", plugins=[str(path) for path in plugins]), options)
    line = [sys.executable, str(stages_dir() / "score.py"), str(options)]
    done = subprocess.run(line, capture_output=True, encoding="utf-8", check=False)
    return done.returncode, [json.loads(row) for row in done.stdout.splitlines()], done.stderr


def test_the_example_of_the_docs_scores_a_file(tmp_path: Path) -> None:
    page = (stages_dir().parent / "docs" / "rewards.md").read_text("utf-8")
    code = re.findall(r"```python\n(# my_rewards.py\n.*?)```", page, re.DOTALL)[0]
    path = tmp_path / "my_rewards.py"
    path.write_text(code)
    rows = [
        {"question": "?", "completion": "<think>\n" + "x" * 300 + "\n</think>\n\nshort"},
        {"question": "?", "completion": "x" * 300},
        {"completion": 3},
    ]
    code_, found, complaint = scored(tmp_path, "brief", rows, path)
    assert code_ == 0 and [row["value"] for row in found] == [1.0, 0.0, None]
    assert "rows.jsonl:3: completion must be a string" in complaint
    code_, found, _ = scored(tmp_path, "shortest", rows[:2], path)
    assert code_ == 0 and [row["status"] for row in found] == ["scored"] * 2


def test_neighbouring_rows_of_one_prompt_are_a_group(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "def size(p, completions): return [None if p.checker else len(completions)] * len(completions)\n"
        "def mine(p, c): print('to the terminal'); return p.checker.get('n', 0)\n"
    )
    rows = [{"question": q, "completion": "x"} for q in "aab"] + [{"checker": {"n": 5}, "completion": "x"}]
    _, found, _ = scored(tmp_path, "size", rows, path)
    assert [row["value"] for row in found] == [2.0, 2.0, 1.0, None]
    assert found[-1] == {
        "status": "scored",
        "value": None,
        "detail": "the reward has no rule for this prompt",
    }
    _, found, printed = scored(tmp_path, "mine", rows, path)
    assert [row["value"] for row in found] == [0.0, 0.0, 0.0, 5.0] and "to the terminal" in printed


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        ("acuracy", "--reward acuracy is no rule, not installed, and in no --plugin; did you mean accuracy?"),
        ("cosine", "--reward cosine needs a run; give accuracy, code, format, language, or a custom reward"),
    ],
)
def test_score_refuses_what_is_no_reward_of_a_file(tmp_path: Path, reward: str, told: str) -> None:
    code, found, complaint = scored(tmp_path, reward, [{"completion": "x"}])
    assert (code, found) == (2, []) and told in complaint and complaint.count("\n") == 1
