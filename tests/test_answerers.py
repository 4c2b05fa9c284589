"""Teachers and judges answer: checkpoints of this machine, and servers in OpenAI's protocol."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_servers import chat_server, say
from tiny_runs import tiny_run

from r1pipe.chat.answerer import AnswerParams
from r1pipe.chat.server import ServerAnswerer
from r1pipe.config import AnswererConfig, ParentRef
from r1pipe.config.answerer import answerer_rules, is_server
from r1pipe.core.errors import CheckpointError, EnvironmentProblem
from r1pipe.core.paths import content_dir
from r1pipe.core.types import Message, Prompt
from r1pipe.runs import checkpoints, servers, stopping
from r1pipe.train.answering import licence_in_card, open_answerer
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.run import open_run

CONFIG = AnswererConfig("MIT", None, "TEACHER_KEY", 5.0, 2, 3, 1.0, 2.0)
PROMPTS = [
    Prompt("a", "word", "en", "2+2?"),
    Prompt("b", "word", "en", "3+3?", context=(Message("system", "S"),)),
]
BASE = content_dir() / "base"


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "BACKOFF_S", 0.01)


def test_a_server_is_asked_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sesame\n")
    with chat_server(lambda body: say(*[body["messages"][-1]["content"]] * body["n"])) as served:
        teacher = ServerAnswerer("teacher", served.url, CONFIG)
        answers = teacher.answer(PROMPTS, AnswerParams(50, 0.6, 0.95, n=2, seed=7))
    assert [[c.text for c in each] for each in answers] == [["2+2?"] * 2, ["3+3?"] * 2]
    assert not answers[0][0].truncated and answers[0][0].tokens == []
    by_question = {body["messages"][-1]["content"]: body for body in served.requests}
    assert by_question["3+3?"]["messages"][0] == {"role": "system", "content": "S"}
    first = by_question["2+2?"]
    assert (first["model"], first["max_tokens"], first["temperature"], first["top_p"]) == ("m", 50, 0.6, 0.95)
    assert first["seed"] != by_question["3+3?"]["seed"]
    assert {headers["Authorization"] for headers in served.headers} == {"Bearer sesame"}
    assert teacher.identity.kind == "server" and teacher.identity.licence == "MIT"
    assert teacher.identity.name == f"{served.url}/v1 m"
    spent = teacher.spent
    assert (spent.requests, spent.prompt_tokens, spent.completion_tokens) == (2, 20, 16)
    assert spent.usd == pytest.approx((20 * 1 + 16 * 2) / 1e6)


def test_a_server_that_gives_one_answer_at_a_time_is_asked_again() -> None:
    with chat_server(lambda body: say("yes")) as served:
        [answers] = ServerAnswerer("teacher", served.url, CONFIG).answer(PROMPTS[:1], AnswerParams(5, n=3))
    assert len(answers) == 3
    assert len({body["seed"] for body in served.requests}) == 3


def test_thoughts_and_cut_off_answers() -> None:
    with chat_server(lambda body: say("4", finish="length", reasoning_content="two and two")) as served:
        [[answer]] = ServerAnswerer("teacher", served.url, CONFIG).answer(PROMPTS[:1], AnswerParams(5))
    assert answer.text == "<think>\ntwo and two\n</think>\n\n4" and answer.truncated


def test_a_server_that_recovers_is_asked_again() -> None:
    replies = iter([(503, "busy"), (0, ""), say("4")])
    with chat_server(lambda body: next(replies)) as served:
        [[answer]] = ServerAnswerer("teacher", served.url, CONFIG).answer(PROMPTS[:1], AnswerParams(5))
    assert answer.text == "4" and len(served.requests) == 3


@pytest.mark.parametrize(
    ("reply", "told", "asked"),
    [
        ((500, "out of\nmemory"), "500 Internal Server Error: out of memory; requests: 3", 3),
        ((401, "sesame is no key"), "401 Unauthorized: *** is no key; requests: 1", 1),
        ((200, "<html>"), "no JSON (Expecting value", 3),
        ((200, {"choices": []}), "answers no choices", 1),
    ],
)
def test_a_lost_server_is_one_line(
    monkeypatch: pytest.MonkeyPatch, reply: tuple[int, object], told: str, asked: int
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sesame")
    with chat_server(lambda body: reply) as served:
        teacher = ServerAnswerer("teacher", served.url, CONFIG)
        with pytest.raises(EnvironmentProblem, match="teacher: ") as lost:
            teacher.answer(PROMPTS[:1], AnswerParams(5))
    assert told in str(lost.value) and "\n" not in str(lost.value)
    assert len(served.requests) == asked


def test_another_model_than_is_served_is_refused() -> None:
    def told(url: str, config: AnswererConfig) -> str:
        with pytest.raises(EnvironmentProblem) as problem:
            ServerAnswerer("teacher", url, config)
        return str(problem.value)

    with chat_server(lambda body: say("4")) as served:
        other = told(served.url, replace(CONFIG, served_name="llama"))
    assert "serves m and not llama; choose one with served_name" in other
    assert "see that the server runs" in told(served.url, replace(CONFIG, retries=0))  # it is gone by now
    with chat_server(lambda body: say("4"), models={"data": []}) as served:
        assert "serves no model" in told(served.url, CONFIG)


def test_a_request_to_stop_ends_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopping, "requested", lambda: 15)
    with chat_server(lambda body: say("4")) as served, pytest.raises(stopping.Stopped):
        ServerAnswerer("teacher", served.url, CONFIG).answer(PROMPTS, AnswerParams(5))


def taken(teacher: ServerAnswerer, prompts: list[Prompt], into: list[int]) -> None:
    """Which prompts are answered, in the order of the answers."""
    for i, _ in teacher.as_they_come(enumerate(prompts), AnswerParams(5)):
        into.append(i)


def test_what_was_answered_before_a_request_to_stop_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[int] = []
    monkeypatch.setattr(stopping, "requested", lambda: 15 if got else 0)
    with chat_server(lambda body: say("4")) as served:
        teacher = ServerAnswerer("teacher", served.url, CONFIG)
        with pytest.raises(stopping.Stopped):
            taken(teacher, PROMPTS * 10, got)
    assert 0 < len(got) < 20


def test_what_is_under_way_at_a_failure_still_comes_and_nothing_more_is_asked() -> None:
    failed, got = threading.Event(), list[int]()

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        if body["messages"][-1]["content"] == "2+2?":
            failed.set()
            return 400, "no"
        failed.wait(60)
        return say("6")

    with chat_server(reply) as served:
        teacher = ServerAnswerer("teacher", served.url, replace(CONFIG, parallel=2))
        with pytest.raises(EnvironmentProblem, match="400"):
            taken(teacher, [*PROMPTS, *[PROMPTS[0]] * 50], got)
    assert got == [1] and len(served.requests) <= 4


def test_a_checkpoint_answers(tmp_path: Path) -> None:
    parent = ParentRef("base", "bundled", str(BASE), checkpoints.manifest_hash(BASE))
    with open_run(tiny_run(tmp_path / "run", "stage=grpo")) as run:
        ranks = Ranks(run.config.engine)
        teacher = open_answerer(run, ranks, "teacher", parent, replace(CONFIG, licence=None))
        too_long = Prompt("c", "word", "en", "7" * 600)
        params = AnswerParams(8, temperature=0.0, n=2)
        first, second, third = teacher.answer([*PROMPTS, too_long], params)
        assert [c.text for c in first] == [first[0].text] * 2 != [""] * 2
        assert len(first[0].tokens) <= 8 and len(second) == 2
        assert [(c.text, c.truncated) for c in third] == [("", True)] * 2
        assert teacher.answer(PROMPTS[:1], params)[0][0].tokens == first[0].tokens
        assert teacher.identity.version == parent.hash
        assert teacher.spent.requests == 3 and teacher.spent.completion_tokens > 0
        with pytest.raises(CheckpointError):
            open_answerer(run, ranks, "teacher", replace(parent, hash="0" * 64), CONFIG)
        teacher.close()


def test_licences_of_model_cards(tmp_path: Path) -> None:
    assert licence_in_card(tmp_path) == ""
    for text, licence in {
        "---\nlicense: apache-2.0\n---\n# Model": "apache-2.0",
        "# Model\nlicense: mit": "",
        "---\nlicense: [1, 2\n---\n": "",
    }.items():
        (tmp_path / "README.md").write_text(text)
        assert licence_in_card(tmp_path) == licence


def test_what_a_config_may_name() -> None:
    assert is_server("http://127.0.0.1:8000/v1") and not is_server("models/qwen") and not is_server("grpo")
    told = {
        "http://user:word@host/v1": "holds a user or password",
        "http://host:0/v1": "must be http://HOST:PORT/v1",
        "https://": "must be http://HOST:PORT/v1",
        "htp://host/v1": "is no address of a server; it must be http://HOST:PORT/v1",
        "http://host/v1?key=3": "must be http://HOST:PORT/v1",
    }
    for name, line in told.items():
        [rule] = answerer_rules("teacher", name, "stage.teacher", CONFIG)
        assert line in rule and rule.startswith("teacher")
    assert not [*answerer_rules("teacher", "https://host/v1", "stage.teacher", CONFIG)]
    wrong = replace(CONFIG, key_variable="a key")
    assert "stage.teacher.key_variable" in next(answerer_rules("teacher", None, "stage.teacher", wrong))
