"""Servers that a stage asks are looked for before its job starts."""

from pathlib import Path

import pytest
from fake_servers import chat_server, say
from fakes import House

from r1pipe.cli.doctor import check_asked
from r1pipe.config import RunConfig
from r1pipe.config.compose import compose
from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.paths import RunFolder
from r1pipe.runs.findings import FAIL, PASS
from r1pipe.runs.servers import check_servers

DEAD = "http://127.0.0.1:1"
PREFERENCES = ["stage=all_scenario", "+stage.rewards.weights.judge=1"]


def config_of(*words: str) -> RunConfig:
    return compose([*words]).config


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["stage=distill", f"teacher={DEAD}"], "teacher"),
        ([*PREFERENCES, f"judge={DEAD}"], "judge"),
        (["stage=base", f"judge={DEAD}"], "judge"),
        (["stage=grpo", "engine.sampler=vllm", f"sampler.url={DEAD}"], "sampler.url"),
        (
            [
                "stage=grpo",
                "+stage.rewards.weights.mine=1",
                f"+stage.rewards.remote.mine={DEAD}/score",
            ],
            "stage.rewards.remote.mine",
        ),
    ],
)
def test_one_that_is_not_there_is_one_line_with_its_key(words: list[str], key: str) -> None:
    with pytest.raises(EnvironmentProblem) as lost:
        check_servers(config_of(*words))
    line = str(lost.value)
    assert line.startswith(f"{key}: ") and "Connection refused" in line and "\n" not in line


def test_those_that_answer_are_listed(tmp_path: Path) -> None:
    with chat_server(lambda body: say("4")) as served:
        url, run = served.url, RunFolder(tmp_path)
        teacher = config_of("stage=distill", f"teacher={url}")
        assert check_servers(teacher, run) == ["teacher"]
        with pytest.raises(EnvironmentProblem, match="serves m and not llama"):
            check_servers(config_of("stage=distill", f"teacher={url}", "stage.teacher.served_name=llama"))
        compared = config_of("stage=base", f"judge={url}", f"stage.judge.baseline={url}")
        assert check_servers(compared) == ["judge", "stage.judge.baseline"]
        rewarded = ["+stage.rewards.weights.mine=1", f"+stage.rewards.remote.mine={url}/score"]
        assert check_servers(config_of("stage=grpo", *rewarded)) == ["stage.rewards.remote.mine"]  # 404
        assert [finding.status for finding in check_asked(teacher)] == [PASS]
        assert served.requests == []
    run.dataset.parent.mkdir()
    run.dataset.touch()
    assert check_servers(teacher, run) == [], "all of its answers are there"
    scores = ["stage.extract=feedback", "stage.feedback.by=rubric", "stage.transfer=rl"]
    with pytest.raises(EnvironmentProblem):  # it goes on to score what the student draws
        check_servers(config_of("stage=distill", f"teacher={url}", *scores, "stage.rl.score_weight=1"), run)


def test_the_doctor_says_which_does_not_answer() -> None:
    [finding] = check_asked(config_of("stage=distill", f"teacher={DEAD}"))
    assert finding.status == FAIL and "see that the server runs" in finding.remedy
    assert check_asked(config_of("stage=grpo")) == []


def test_nothing_is_started_without_the_teacher(house: House, capsys: pytest.CaptureFixture) -> None:
    assert house.call("run", "stage=distill", "parent=bundled", f"teacher={DEAD}") == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "teacher: http://127.0.0.1:1/v1/models fails" in told
    assert not house.runs()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["stage=distill", "teacher=htp://x"], "teacher=htp://x is no address of a server; it must be http"),
        (
            ["stage=distill", "parent=bundled", "teacher=nobody"],
            "a Hugging Face folder, or a server's URL (http://HOST:PORT",
        ),
        (["stage=base", "judge=host:8000/v1"], "a Hugging Face folder, or a server's URL (http://HOST:PORT"),
        (
            ["stage=base", "judge=x", "stage.judge.baseline=ftp://x"],
            "stage.judge.baseline=ftp://x is no addr",
        ),
    ],
)
def test_a_name_that_is_nobodys_is_told_what_it_may_be(
    house: House, capsys: pytest.CaptureFixture, words: list[str], told: str
) -> None:
    assert house.call("run", *words) == 2
    line = capsys.readouterr().err
    assert told in line and line.count("\n") == 1


def test_a_baseline_file_that_is_missing_is_refused(house: House, capsys: pytest.CaptureFixture) -> None:
    words = ["run", "stage=base", "judge=bundled", "stage.judge.baseline=answers.jsonl"]
    assert house.call(*words) == 2
    assert "stage.judge.baseline=answers.jsonl is no file" in capsys.readouterr().err
