"""Servers as rewards: what they are sent, what their answers mean; a failure is never a wrong answer."""

import threading
from contextlib import suppress
from typing import Any

import pytest
from custom_rewards import rewards_config, scores
from fake_servers import FakeServer, Handler, replying

from r1pipe.config import RemoteLimits
from r1pipe.core.types import Score, Status
from r1pipe.rewards import remote
from r1pipe.rewards.custom import CustomRewards

FAILED, LOST = Status.VERIFIER_FAILED, Status.INFRASTRUCTURE_FAILED
GOOD = {"scores": [0.5, None, {"value": 1, "status": "scored", "detail": "why"}]}


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BACKOFF_S", 0.01)


def asking(server: FakeServer, **changed: Any) -> CustomRewards:
    return CustomRewards(rewards_config(["mine"], remote={"mine": server.url}, **changed))


def test_a_server_gets_json_and_gives_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("R1PIPE_REWARD_TOKEN", "open-sesame\n")
    with replying((200, GOOD)) as server:
        custom = asking(server)
        assert scores(custom, "a", "bb", "c") == [Score(0.5), None, Score(1.0, detail="why")]
        [body], [headers] = server.requests, server.headers
        assert headers["Authorization"] == "Bearer open-sesame"
        assert body["completions"][1] == {"text": "bb", "finish_reason": "stop", "length": 2}
        prompt = {
            "id": "p",
            "task": "word",
            "language": "en",
            "question": "2+2?",
            "answer": "4",
            "level": 3,
            "subject": "",
        }
        prompt |= {"checker": {"pair": [1, 2]}, "context": [{"role": "system", "content": "Be brief."}]}
        assert body["prompt"] == prompt


@pytest.mark.parametrize("first", [(500, "down"), (503, ""), (429, "slowly"), (0, "")])
def test_a_server_that_recovers_is_asked_again(first: tuple[int, str]) -> None:
    with replying(first, first, (200, GOOD)) as server:
        assert scores(asking(server), "a", "b", "c")[0] == Score(0.5)
        assert len(server.requests) == 3


def test_a_token_that_is_refused_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("R1PIPE_REWARD_TOKEN", "open-sesame")
    with replying((401, "open-sesame is no token")) as server:
        [score] = scores(asking(server), "a")
    assert score and score.detail.endswith("401 Unauthorized: *** is no token; 1 requests")


@pytest.mark.parametrize(
    ("answer", "told", "asked"),
    [
        ((500, "out of\nmemory"), "500 Internal Server Error: out of memory; 3 requests", 3),
        ((0, ""), "; 3 requests", 3),
        ((404, "no such reward"), "404 Not Found: no such reward; 1 requests", 1),
        ((307, ""), "307 Temporary Redirect; 1 requests", 1),
    ],
)
def test_a_server_that_is_down_or_refuses_gives_no_verdict(
    answer: tuple[int, str], told: str, asked: int
) -> None:
    with replying(answer) as server:
        [score] = scores(asking(server), "a")
        assert score and score.status is LOST and server.url in score.detail and score.detail.endswith(told)
        assert len(server.requests) == asked


def test_a_server_that_is_not_there() -> None:
    gone = FakeServer(lambda path, body: (200, GOOD))
    gone.server_close()
    [score] = scores(asking(gone), "a")
    assert score and score.status is LOST and "refused" in score.detail


@pytest.mark.parametrize("a_byte_now_and_then", [False, True])
def test_a_server_that_does_not_answer_in_time(a_byte_now_and_then: bool) -> None:
    released = threading.Event()

    def answer(handler: Handler) -> None:
        if a_byte_now_and_then:
            handler.wfile.write(b"HTTP/1.0 200 OK\r\n\r\n")
        with suppress(OSError):  # the client has gone
            while not released.wait(0.05):
                if a_byte_now_and_then:
                    handler.wfile.write(b" ")

    limits = RemoteLimits(connections=1, timeout_s=0.3, retries=0)
    with replying((200, answer)) as server:
        [score] = scores(asking(server, remote_limits=limits), "a")
        released.set()
    assert score and score.status is LOST and "timed out" in score.detail


def test_a_server_whose_complaint_does_not_arrive() -> None:
    released = threading.Event()

    def answer(handler: Handler) -> None:
        handler.wfile.write(b"HTTP/1.0 500 Internal Server Error\r\nContent-Length: 100\r\n\r\n")
        released.wait(60)

    limits = RemoteLimits(connections=1, timeout_s=0.3, retries=0)
    with replying((500, answer)) as server:
        [score] = scores(asking(server, remote_limits=limits), "a")
        released.set()
    assert score and score.status is LOST and score.detail.endswith("500 Internal Server Error; 1 requests")


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ("<html>", "Expecting value"),
        ([1.0], "it has no list `scores`"),
        ({"scores": 1.0}, "it has no list `scores`"),
        ({"scores": [1.0]}, "1 for 2 completions"),
        ({"scores": [1.0, "good"]}, "'good' is a str"),
        ('{"scores": [1.0, NaN]}', "nan is no finite number"),
        ('{"scores": [1.0, 1' + "0" * 400 + "]}", "inf is no finite number"),
        ({"scores": [1.0, {"score": 1}]}, "has not the keys value, status and detail"),
        ({"scores": [1.0, {"value": 1, "status": "fine"}]}, "'fine' is not a valid Status"),
        ("[" * 100_000, "recursion"),
        (" " * (remote.REPLY_LIMIT + 1), "more than"),
    ],
)
def test_an_answer_of_another_shape_is_no_verdict(answer: Any, told: str) -> None:
    with replying((200, answer)) as server:
        found = scores(asking(server), "a", "b")
        assert all(s and s.status is FAILED and told in s.detail and server.url in s.detail for s in found)
        assert len(server.requests) == 1
