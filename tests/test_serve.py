"""`r1pipe serve`: OpenAI's protocol, answers that do not depend on who else asks, clients that misbehave."""

import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bases import base_in_float32
from forked import LIMIT_S, wait_until
from hf_models import write_model

from r1pipe.chat.answerer import AnswerParams
from r1pipe.chat.server import ServerAnswerer
from r1pipe.chat.stream import AnswerText, Piece
from r1pipe.chat.template import Chat, parse
from r1pipe.cli.serve import settings as serving
from r1pipe.config import AnswererConfig
from r1pipe.core.errors import ConfigError, EnvironmentProblem
from r1pipe.core.paths import content_dir
from r1pipe.core.types import Prompt
from r1pipe.serve.engine import Engine
from r1pipe.serve.protocol import Reader
from r1pipe.serve.server import Server
from r1pipe.train.rollout import SamplingParams
from r1pipe.train.rollout.batching import Batcher
from r1pipe.train.standalone import drawing_defaults, load

BASE = content_dir() / "base"
QUESTION = "Use 3, 5 and 7 to make 22."
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
MODEL = "tiny"


def ask(server: Server, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """Status and content of a reply; `body`: JSON, or bytes as they are; None: GET."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=LIMIT_S)
    data = body if isinstance(body, bytes) or body is None else json.dumps(body)
    connection.request("GET" if body is None else "POST", path, data, headers)
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    return reply.status, json.loads(content)


def events(server: Server, path: str, body: dict) -> list[Any]:
    """The events of a streamed reply, [DONE] at the end."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=LIMIT_S)
    connection.request("POST", path, json.dumps(body | {"stream": True}))
    reply = connection.getresponse()
    assert reply.status == 200, reply.read()
    assert reply.headers["Content-Type"].startswith("text/event-stream")
    lines = reply.read().decode().split("\n\n")
    assert lines.pop() == ""
    found = [line.removeprefix("data: ") for line in lines]
    return [event if event == "[DONE]" else json.loads(event) for event in found]


def talk(text: str = QUESTION, **more: Any) -> dict:
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 12, "seed": 1, **more}


@contextmanager
def served(folder: Path, **changes: Any) -> Iterator[Server]:
    """A server in this process, on a free port."""
    settings = replace(serving([]), **{"port": 0, "client_s": 5.0, **changes})
    chat, model = Chat.load(folder), load(folder)
    with Server(settings) as server:
        engine = Engine(model, chat.eos_ids, chat.pad_id, settings.max_num_seqs, settings.max_waiting)
        defaults, vocabulary = drawing_defaults(folder), model.config.vocab_size
        server.open_to(Reader(MODEL, chat, engine.longest, vocabulary, defaults, settings, 0), engine)
        engine.start()
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server
        engine.close(0)
        server.shutdown()
        thread.join()
        assert not engine.alive


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(base_in_float32(tmp_path_factory.mktemp("model") / "base")) as server:
        yield server


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(write_model(tmp_path_factory.mktemp("model") / "qwen", "qwen3")) as server:
        yield server


@pytest.fixture(params=["bundled", "qwen"])
def server(request: pytest.FixtureRequest) -> Server:
    return request.getfixturevalue(request.param)


def idle(server: Server) -> bool:
    """Whether nothing is drawn any more, after a while for it to end."""
    ends = time.monotonic() + LIMIT_S
    while server.engine.state() != (0, 0) and time.monotonic() < ends:
        time.sleep(0.02)
    return server.engine.state() == (0, 0)


def test_the_model_is_listed_and_healthy(server):
    status, listed = ask(server, "/v1/models")
    assert status == 200 and [model["id"] for model in listed["data"]] == [MODEL]
    assert listed["data"][0]["max_model_len"] == server.engine.longest
    assert ask(server, f"/v1/models/{MODEL}")[1] == listed["data"][0]
    assert ask(server, "/health") == (200, {"status": "ok", "running": 0, "waiting": 0})


def test_an_answer_is_that_of_the_sampler(server):
    """Same seed, same draws as `r1pipe generate` and training."""
    chat, model = server.reader.chat, server.engine.model
    prompt = chat.prompt_tokens(Prompt("", "", "", QUESTION))
    drawn = SamplingParams(12, temperature=0.8, top_p=0.9, n=3, seed=7)
    expected = Batcher(model, chat.eos_ids, chat.pad_id).generate([prompt], drawn)
    status, reply = ask(server, CHAT, talk(temperature=0.8, top_p=0.9, n=3, seed=7, model=MODEL))
    assert status == 200 and reply["object"] == "chat.completion"
    for choice, completion in zip(reply["choices"], expected, strict=True):
        message = choice["message"]
        told = message.get("reasoning_content", "") + message["content"]
        text = chat.response(completion.tokens)
        assert "".join(told.split()) == "".join(text.replace("<think>", "").replace("</think>", "").split())
        assert choice["finish_reason"] == completion.finish_reason
    tokens = sum(len(completion.tokens) for completion in expected)
    assert reply["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": tokens,
        "total_tokens": len(prompt) + tokens,
    }
    by_ids = {"prompt": prompt, "max_tokens": 12, "temperature": 0.8, "top_p": 0.9, "n": 3, "seed": 7}
    status, raw = ask(server, COMPLETIONS, by_ids)
    assert status == 200 and raw["object"] == "text_completion"
    assert [choice["text"] for choice in raw["choices"]] == [chat.decode(one.tokens) for one in expected]


def test_an_answer_depends_on_its_own_seed_and_not_on_who_shares_the_batch(server):
    questions = [f"Use {i}, 5 and 7 to make {20 + i}." + " Why?" * (i % 4) for i in range(10)]
    bodies = [
        talk(q, seed=i, max_tokens=4 + 3 * i, temperature=0.5 + 0.1 * (i % 3))
        for i, q in enumerate(questions)
    ]
    alone = [ask(server, CHAT, body)[1]["choices"] for body in bodies]
    with ThreadPoolExecutor(10) as pool:
        waits = [pool.submit(lambda body=body: ask(server, CHAT, body)[1]["choices"]) for body in bodies * 2]
    assert [wait.result() for wait in waits] == alone * 2
    other = ask(server, CHAT, talk(questions[9], seed=99, max_tokens=31))[1]["choices"]
    assert other != alone[9]


def test_a_request_joins_while_another_is_drawn(qwen):
    long = talk("Count.", max_tokens=900, temperature=3.0, seed=3)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, qwen, CHAT, long)
        while qwen.engine.state()[0] == 0:
            time.sleep(0.001)
        assert ask(qwen, CHAT, talk(max_tokens=2))[0] == 200
        assert not first.done(), "the short answer came while the long one was drawn"
        assert first.result()[1]["usage"]["completion_tokens"] > 50


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_stream_says_what_the_whole_reply_says(server, path):
    body = (
        talk(n=2, max_tokens=40)
        if path == CHAT
        else {"prompt": QUESTION, "max_tokens": 40, "n": 2, "seed": 4}
    )
    body |= {"stream_options": {"include_usage": True}, "temperature": 1.0}
    body |= {"logprobs": True, "top_logprobs": 2} if path == CHAT else {"logprobs": 2}
    whole = ask(server, path, body)[1]
    *chunks, usage, done = events(server, path, body)
    assert done == "[DONE]" and usage["choices"] == [] and usage["usage"] == whole["usage"]
    if path == CHAT:
        assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
        assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    for choice in whole["choices"]:
        mine = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert [part["finish_reason"] for part in mine if part["finish_reason"]] == [choice["finish_reason"]]
        if path == CHAT:
            for name in ("content", "reasoning_content"):
                said = "".join(part["delta"].get(name, "") for part in mine)
                assert said == choice["message"].get(name, "")
            listed = [entry for part in mine for entry in (part.get("logprobs") or {}).get("content", [])]
            assert listed == choice["logprobs"]["content"]
        else:
            assert "".join(part["text"] for part in mine) == choice["text"]


def test_thought_and_answer_are_apart(bundled, monkeypatch):
    """With an engine that says what the test wants."""
    chat = bundled.reader.chat
    text = "<think>\n3+5=8 < 22\n</think>\n\n3*5+7 = 22"
    tokens = [*chat.encode(text), chat.eos_id]

    def said(decoder, tokens_S, positions_S, cache, length):
        logits = torch.full((len(tokens_S), chat.vocab_size), -1e4)
        lengths_S = bundled.engine._slots.prompt_lengths_S
        places = (positions_S + 1 - lengths_S).clamp(max=len(tokens) - 1)
        logits[range(len(tokens_S)), torch.tensor(tokens)[places]] = 1e4
        return logits

    kind = type(bundled.engine._decoder)
    first = kind.prefill

    def prefill(decoder, tokens_BT, lengths_B):
        entries, logits = first(decoder, tokens_BT, lengths_B)
        logits = torch.full_like(logits, -1e4)
        logits[:, tokens[0]] = 1e4
        return entries, logits

    monkeypatch.setattr(kind, "decode", said)
    monkeypatch.setattr(kind, "prefill", prefill)
    [choice] = ask(bundled, CHAT, talk(max_tokens=200))[1]["choices"]
    expected = {"role": "assistant", "content": "3*5+7 = 22", "reasoning_content": "3+5=8 < 22"}
    assert choice["message"] == expected and choice["finish_reason"] == "stop"
    chunks = events(bundled, CHAT, talk(max_tokens=200))[:-1]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "3+5=8 < 22"
    assert "".join(delta.get("content", "") for delta in deltas) == "3*5+7 = 22"
    assert len(deltas) > 5, "it comes bit by bit"
    [cut] = ask(bundled, CHAT, talk(max_tokens=200, stop=["5+7", "never"]))[1]["choices"]
    assert cut["message"]["content"] == "3*" and cut["finish_reason"] == "stop"
    [raw] = ask(bundled, COMPLETIONS, {"prompt": "x", "max_tokens": 200, "stop": "</think>"})[1]["choices"]
    assert raw["text"] == "<think>\n3+5=8 < 22\n"
    [thinking] = ask(bundled, CHAT, talk(max_tokens=8))[1]["choices"]
    assert thinking["message"]["content"] == "" and thinking["finish_reason"] == "length"


@torch.no_grad()
def test_log_probabilities_are_those_of_the_model(server):
    chat, model = server.reader.chat, server.engine.model
    prompt = chat.encode(QUESTION)
    body = {"prompt": [prompt, prompt[:3]], "max_tokens": 5, "temperature": 0.7, "seed": 2, "logprobs": 3}
    body |= {"echo": True, "return_tokens_as_token_ids": True}
    status, reply = ask(server, COMPLETIONS, body)
    assert status == 200
    for choice, asked in zip(reply["choices"], (prompt, prompt[:3]), strict=True):
        found = choice["logprobs"]
        tokens = [int(token.removeprefix("token_id:")) for token in found["tokens"]]
        assert tokens[: len(asked)] == asked and choice["text"].startswith(chat.tokenizer.decode(asked))
        logprobs = model(torch.tensor([tokens]))[0].float().log_softmax(-1)
        expected = logprobs[:-1].gather(1, torch.tensor(tokens[1:]).unsqueeze(1)).squeeze(1)
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        told = torch.tensor(found["token_logprobs"][1:])
        torch.testing.assert_close(told, expected, atol=2e-4, rtol=0)
        for place, tops in enumerate(found["top_logprobs"][1:]):
            likeliest = {f"token_id:{number}" for number in logprobs[place].topk(3).indices.tolist()}
            assert likeliest | {found["tokens"][place + 1]} == set(tops)
    scored = ask(server, COMPLETIONS, body | {"max_tokens": 0})[1]["choices"][0]["logprobs"]
    assert scored["token_logprobs"] == reply["choices"][0]["logprobs"]["token_logprobs"][: len(prompt)]
    assert [len(token) for token in scored["tokens"]] and scored["text_offset"][0] == 0


def test_the_checkpoints_own_defaults_hold(tmp_path):
    folder = write_model(tmp_path / "qwen", "qwen3")
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.0, "top_p": 0.9}))
    with served(folder) as server:
        greedy = ask(server, CHAT, talk(temperature=0))[1]["choices"]
        assert ask(server, CHAT, talk(seed=5))[1]["choices"] == greedy
        assert ask(server, CHAT, talk(temperature=3.0))[1]["choices"] != greedy


TEXTS = [
    "<think>\n3+5=8 < 22\n</think>\n\n3*5+7 = 22",
    "  <think> a </thin b</think>c ",
    "<think>never closed </thi",
    "<thin air, 用 3 凑出 22。 ",
    "\n plain </think> text",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_of_an_answer_do_not_depend_on_how_its_tokens_come(text):
    chat, generator = Chat.load(BASE), random.Random(text)
    tokens = [*chat.encode(text), *(generator.randrange(1000) for _ in range(10)), chat.eos_id]
    for stop in ([], ["22", "凑"], ["c", " a"]):
        whole = AnswerText(chat, stop, True).feed(tokens, True)
        for _ in range(20):
            parted, said, at = AnswerText(chat, stop, True), Piece(), 0
            while at < len(tokens) and not parted.stopped:
                size = generator.randint(1, 3)
                said += parted.feed(tokens[at : at + size], at + size >= len(tokens))
                at += size
            assert said == whole
        raw = AnswerText(chat, [], False).feed(tokens, True)
        assert raw == Piece(content=chat.decode(tokens))
    parsed, said = parse(text), AnswerText(chat, [], True).feed(chat.encode(text), True)
    if parsed.well_formed:
        assert (said.reasoning, said.content.strip()) == (parsed.reasoning, parsed.summary)


WRONG: list[tuple[str, Any, int, str]] = [
    (CHAT, b"{", 400, "not JSON"),
    (CHAT, b"\xff\xfe{}", 400, "not JSON"),
    (CHAT, b'{"temperature": NaN}', 400, "not JSON"),
    (CHAT, b"[" * 100_000, 400, "not JSON"),
    (CHAT, b'{"n": ' + b"9" * 10_000 + b"}", 400, "not JSON"),
    (CHAT, [], 400, "JSON object"),
    (CHAT, {}, 400, "messages must end"),
    (CHAT, {"messages": "hello"}, 422, "messages"),
    (CHAT, {"messages": [{"role": "king", "content": "x"}]}, 422, "role"),
    (CHAT, {"messages": [{"role": "user"}]}, 422, "content must be text"),
    (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "no text"),
    (CHAT, {"messages": [{"role": "user", "content": "\ud800"}]}, 400, "surrogates"),
    (CHAT, {"messages": [{"role": "assistant", "content": "x"}]}, 400, "end with one of the user"),
    (CHAT, talk(model="gpt-9"), 404, "there is no model gpt-9"),
    (CHAT, talk(n=0), 422, "n="),
    (CHAT, talk(n=10**9), 422, "serve.max_n"),
    (CHAT, talk(n=True), 422, "n="),
    (CHAT, talk(max_tokens=-5), 422, "max_tokens"),
    (CHAT, talk(max_tokens=0), 422, "max_tokens"),
    (CHAT, talk(max_tokens="many"), 422, "max_tokens"),
    (CHAT, talk(temperature=-1), 422, "temperature"),
    (CHAT, talk(temperature=1e-9), 422, "temperature"),
    (CHAT, talk(top_p=0), 422, "top_p"),
    (CHAT, talk(stop=5), 422, "stop"),
    (CHAT, talk(stop=["x"] * 99), 422, "serve.max_stop"),
    (CHAT, talk(top_logprobs=3), 422, "needs logprobs"),
    (CHAT, talk(logprobs=True, top_logprobs=999), 422, "serve.max_top_logprobs"),
    (CHAT, talk(tools=[{"type": "function"}]), 400, "tools is not supported"),
    (CHAT, talk(presence_penalty=0.5), 400, "presence_penalty is not supported"),
    (CHAT, talk(colour="red"), 400, "colour is no field"),
    (CHAT, talk("7 " * 3000), 400, "shorten it"),
    (COMPLETIONS, {"max_tokens": 3}, 422, "prompt is missing"),
    (COMPLETIONS, {"prompt": ""}, 400, "empty"),
    (COMPLETIONS, {"prompt": [[]]}, 400, "empty"),
    (COMPLETIONS, {"prompt": [10**12]}, 400, "not below"),
    (COMPLETIONS, {"prompt": [-1]}, 400, "not below"),
    (COMPLETIONS, {"prompt": [1, "x"]}, 422, "prompt"),
    (COMPLETIONS, {"prompt": "x", "echo": True, "stream": True}, 400, "not streamed"),
    (COMPLETIONS, {"prompt": ["x"] * 2000}, 422, "serve.max_waiting"),
    ("/v1/embeddings", {}, 404, "known: "),
    ("/v2/models", None, 404, "known: "),
    ("/v1/models/other", None, 404, "no such model"),
]


@pytest.mark.parametrize(("path", "body", "status", "words"), WRONG)
def test_a_request_that_cannot_be_is_refused_in_one_line(bundled, path, body, status, words):
    found, content = ask(bundled, path, body)
    assert (found, set(content)) == (status, {"error"})
    assert words in content["error"]["message"] and "\n" not in content["error"]["message"]


def test_what_asks_for_nothing_is_no_error(bundled):
    more = {"presence_penalty": 0.0, "top_k": -1, "user": "me", "tools": None, "logit_bias": {}}
    assert ask(bundled, CHAT, talk(**more))[0] == 200


def test_random_requests_never_get_a_server_error(bundled):
    generator = random.Random(0)
    values = [
        None,
        True,
        -1,
        0,
        1,
        2,
        10**30,
        0.5,
        -0.0,
        "x",
        "",
        [],
        {},
        [1],
        ["x"],
        [[1]],
        {"a": []},
        "\udfff",
    ]
    names = [
        "messages",
        "prompt",
        "n",
        "max_tokens",
        "temperature",
        "top_p",
        "stop",
        "seed",
        "stream_options",
    ]
    names += ["logprobs", "top_logprobs", "echo", "model", "logit_bias", "stream", "user", "é"]
    statuses = set()
    for number in range(300):
        path, key = ((CHAT, "messages"), (COMPLETIONS, "prompt"))[number % 2]
        valid = {"max_tokens": 2, key: [{"role": "user", "content": "7"}] if path == CHAT else "7"}
        wrong = {generator.choice(names): generator.choice(values) for _ in range(1 + number % 3)}
        statuses.add(ask(bundled, path, valid | wrong | {"stream": False})[0])
    assert statuses <= {200, 400, 404, 422} and 200 in statuses
    data = json.dumps(talk()).encode()
    for _ in range(150):
        broken = bytearray(data)
        for _ in range(3):
            broken[generator.randrange(len(broken))] = generator.randrange(256)
        assert ask(bundled, CHAT, bytes(broken))[0] in (200, 400, 404, 422)
    assert idle(bundled) and ask(bundled, CHAT, talk())[0] == 200


def raw(server: Server, *parts: bytes, pause: float = 0.0) -> bytes:
    """What the server says to bytes that are no proper request."""
    found = b""
    with (
        socket.create_connection(("127.0.0.1", server.server_port), timeout=LIMIT_S) as connection,
        suppress(ConnectionError),
    ):
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)
        while piece := connection.recv(4096):
            found += piece
    return found


def test_what_is_no_http_is_refused(bundled):
    assert b"Bad request syntax" in raw(bundled, b"\x16\x03\x01\x02\x00\r\n\r\n")
    assert b" 405 " in raw(bundled, b"BREW /v1/models HTTP/1.1\r\n\r\n")
    assert b" 400 " in raw(bundled, b"POST /v1/completions HTTP/1.1\r\n\r\n")
    assert b" 400 " in raw(bundled, b"POST /v1/completions HTTP/1.1\r\nContent-Length: -3\r\n\r\n")
    long = b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n"
    assert b" 414 " in raw(bundled, long)
    huge = b"POST /v1/completions HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n"
    assert b" 413 " in raw(bundled, huge, b"x" * 1000)
    expecting = huge.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")
    assert raw(bundled, expecting).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_is_too_large_is_refused_and_the_client_reads_why():
    with served(BASE, max_body_mb=0.01) as server:
        status, content = ask(server, CHAT, talk("x" * 3_000_000))
        assert status == 413 and "serve.max_body_mb" in content["error"]["message"]


def test_a_client_that_is_silent_is_left_and_others_are_answered():
    with served(BASE, client_s=2.0) as server:
        began = b"POST /v1/completions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{"
        assert raw(server, began) == b""
        assert raw(server, b"GET /v1") == b""
        assert b" 408 " in raw(server, began, *[b" "] * 9, pause=0.3)


def test_beyond_its_connections_it_asks_to_come_back():
    with served(BASE, client_s=LIMIT_S, max_connections=3) as server:
        held = [socket.create_connection(("127.0.0.1", server.server_port)) for _ in range(3)]
        wait_until(lambda: ask(server, "/health")[0] == 503, "the refusal")
        for connection in held:
            connection.close()
        wait_until(lambda: ask(server, "/health")[0] == 200, "a place")  # a refusal may cut a longer request
        assert ask(server, CHAT, talk())[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_the_work_for_a_client_that_has_gone_is_dropped(qwen, stream):
    body = json.dumps(talk(max_tokens=900, n=8, temperature=3.0, stream=stream)).encode()
    connection = socket.create_connection(("127.0.0.1", qwen.server_port))
    connection.sendall(b"POST %s HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (CHAT.encode(), len(body), body))
    while qwen.engine.state()[0] < 8:
        time.sleep(0.001)
    told = [answer for answer in qwen.engine.running.values() if not answer.dropped]
    connection.close()
    assert idle(qwen)
    assert min(answer.told for answer in told) < 900, "they were not drawn to the end"


@contextmanager
def held_up(server: Server) -> Iterator[None]:
    """Nothing is drawn here."""
    hold, first = threading.Event(), server.engine._refill
    server.engine._refill = lambda: (hold.wait(LIMIT_S), first())  # type: ignore[method-assign]
    try:
        yield
    finally:
        hold.set()
        server.engine._refill = first  # type: ignore[method-assign]


def test_beyond_its_places_it_asks_to_come_back():
    with (
        served(BASE, max_num_seqs=1, max_waiting=2, request_s=LIMIT_S) as server,
        ThreadPoolExecutor(2) as pool,
    ):
        with held_up(server):
            waits = [pool.submit(ask, server, CHAT, talk()) for _ in range(2)]
            while sum(server.engine.state()) < 2:
                time.sleep(0.01)
            assert ask(server, CHAT, talk())[0] == 429
        assert [wait.result()[0] for wait in waits] == [200, 200]


def test_what_is_not_drawn_in_time_is_given_up():
    with served(BASE, request_s=0.3) as server:
        with held_up(server):
            status, content = ask(server, CHAT, talk())
        assert status == 503 and "serve.request_s" in content["error"]["message"]
        assert idle(server)


def test_our_own_client_is_answered(server, monkeypatch):
    """The Answerer of teachers and judges."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    settings = AnswererConfig(None, None, "OPENAI_API_KEY", 60.0, 0, 4, 1.0, 2.0)
    answerer = ServerAnswerer("teacher", server.url, settings)
    prompts = [Prompt("", "", "", text) for text in (QUESTION, "Why?", "Use 4 and 9 to make 36.")]
    params = AnswerParams(10, temperature=0.0, n=2)
    answers = answerer.answer(prompts, params)
    assert [len(of_prompt) for of_prompt in answers] == [2, 2, 2]
    chat = server.reader.chat
    tokens = [chat.prompt_tokens(prompt) for prompt in prompts]
    greedy = Batcher(server.engine.model, chat.eos_ids, chat.pad_id).generate(
        tokens, SamplingParams(10, temperature=0.0)
    )
    for of_prompt, expected in zip(answers, greedy, strict=True):
        assert of_prompt[0].text.split() == of_prompt[1].text.split()
        assert of_prompt[0].finish_reason == expected.finish_reason
    assert answerer.spent.prompt_tokens == sum(map(len, tokens))
    assert answerer.spent.completion_tokens == 2 * sum(len(one.tokens) for one in greedy)
    assert answerer.identity.version == MODEL


def test_a_hundred_clients_at_once(bundled):
    bodies = [talk(f"Use {i} and 7.", seed=i, max_tokens=6, stream=False) for i in range(100)]
    with ThreadPoolExecutor(100) as pool:
        replies = list(pool.map(lambda body: ask(bundled, CHAT, body), bodies))
    assert {status for status, _ in replies} == {200}
    assert ask(bundled, CHAT, bodies[42])[1]["choices"] == replies[42][1]["choices"]
    assert idle(bundled)


def test_a_key_is_asked_for_and_pages_of_other_sites_are_not_answered(monkeypatch):
    monkeypatch.setenv("R1PIPE_SERVE_KEY", "geheim")
    with served(BASE) as server:
        assert ask(server, "/health")[0] == 200
        status, content = ask(server, CHAT, talk())
        assert status == 401 and "geheim" not in json.dumps(content)
        assert ask(server, CHAT, talk(), Authorization="Bearer wrong")[0] == 401
        assert ask(server, "/v1/models", Authorization="Bearer geheim")[0] == 200
    monkeypatch.delenv("R1PIPE_SERVE_KEY")
    with served(BASE) as server:
        assert ask(server, "/v1/models", Origin="https://elsewhere.example")[0] == 403
        assert ask(server, "/v1/models", Origin=f"http://127.0.0.1:{server.server_port}")[0] == 200


def asked_as(server: Server, *hosts: str) -> bytes:
    """The reply to a request whose Host header is as a page would send it whose name leads here."""
    headers = "".join(f"Host: {host}\r\n" for host in hosts)
    return raw(server, f"GET /v1/models HTTP/1.1\r\n{headers}Connection: close\r\n\r\n".encode())


def test_a_name_that_was_made_to_lead_here_is_refused(monkeypatch):
    with served(BASE) as server:
        port = server.server_port
        mine = ("localhost", f"localhost:{port}", f"LocalHost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}")
        for host in mine:
            assert asked_as(server, host).startswith(b"HTTP/1.1 200 "), host
        others = ("evil.example", f"evil.example:{port}", "localhost.evil.example", "127.0.0.1.evil.example")
        for host in (*others, "10.0.0.1", "", "a b", "localhost:x", "[::1", "\x00", "me@evil.example"):
            reply = asked_as(server, host)
            assert reply.startswith(b"HTTP/1.1 403 ") and b"this server is not called" in reply, host
        assert b"a key in $R1PIPE_SERVE_KEY" in asked_as(server, "evil.example")
        assert asked_as(server, f"localhost:{port}", "evil.example").startswith(b"HTTP/1.1 403 ")
    monkeypatch.setattr(socket, "gethostname", lambda: "Node7")
    with served(BASE, host="0.0.0.0") as server:
        for host in ("10.0.0.1:9", "node7", "localhost", "[fe80::1]:80"):
            assert asked_as(server, host).startswith(b"HTTP/1.1 200 "), host
        assert asked_as(server, "evil.example").startswith(b"HTTP/1.1 403 ")
    monkeypatch.setenv("R1PIPE_SERVE_KEY", "geheim")
    with served(BASE) as server:  # a page of another site has no key, and a proxy may have any name
        assert asked_as(server, "api.example").startswith(b"HTTP/1.1 401 ")
        assert ask(server, "/v1/models", Host="api.example", Authorization="Bearer geheim")[0] == 200


def test_damaged_weights_are_an_error_of_that_request(tmp_path):
    folder = write_model(tmp_path / "qwen", "qwen3")
    with served(folder) as server:
        with torch.no_grad():
            server.engine.model.lm_head.weight.fill_(float("nan"))
        status, content = ask(server, CHAT, talk())
        assert status == 500 and "probability" in content["error"]["message"]
        assert ask(server, "/health")[0] == 200


def test_an_engine_that_fails_leaves_no_client_waiting(monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda failed: None)
    with served(BASE) as server:
        server.engine._tell = lambda: 1 / 0  # type: ignore[method-assign, assignment, return-value]
        status, content = ask(server, CHAT, talk())
        assert status == 503 and "ended" in content["error"]["message"]
        assert ask(server, "/health")[0] == 503 and ask(server, CHAT, talk())[0] == 503


def test_what_cannot_be_listened_on_and_settings_that_cannot_be_are_told():
    with (
        served(BASE) as server,
        pytest.raises(EnvironmentProblem, match=f"port {server.server_port}"),
    ):
        Server(replace(serving([]), port=server.server_port))
    with pytest.raises(ConfigError, match=r"serve\.max_wait is no key"):
        serving(["serve.max_wait=1"])
    with pytest.raises(ConfigError, match=r"serve\.port"):
        serving(["serve.port=99999999"])
    with pytest.raises(ConfigError, match=r"serve\.key_variable"):
        serving(["serve.key_variable='a b'"])


@contextmanager
def command(*words: str) -> Iterator[tuple[subprocess.Popen, str, int]]:
    """`r1pipe serve`, once it listens: the process, what it has shown, and its port."""
    line = [sys.executable, "-u", "-m", "r1pipe", "serve", str(BASE), "--port", "0", *words]
    root = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as process:
        assert process.stdout
        shown = ""
        while "Ctrl-C" not in shown:
            more = process.stdout.readline()
            assert more, process.stderr.read() if process.stderr else ""
            shown += more
        port = int(shown.partition("http://127.0.0.1:")[2].partition("/")[0])
        yield process, shown, port
        process.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_lets_answers_end_and_the_command_leave(number):
    with command("serve.grace_s=60", "--name", "base") as (process, shown, port):
        assert f"curl http://127.0.0.1:{port}/v1/chat/completions" in shown and "warning" not in shown
        body = json.dumps(talk("Use 1, 2.", max_tokens=300, temperature=3.0, n=6, stream=True, model="base"))
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
        connection.request("POST", CHAT, body)
        reply = connection.getresponse()
        begun = reply.read1(100)
        assert begun.startswith(b"data: ")
        process.send_signal(number)
        rest = reply.read()
        assert rest.endswith(b"data: [DONE]\n\n"), "the answer under way was finished"
        _, err = process.communicate(timeout=LIMIT_S)
        assert (process.returncode, err) == (0, "")


def test_a_checkpoint_that_is_not_there_is_one_line():
    line = [sys.executable, "-m", "r1pipe", "serve", "nowhere"]
    done = subprocess.run(
        line, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nowhere" in done.stderr
