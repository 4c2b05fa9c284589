"""What is got out of a teacher: labels, new problems, topics and documents, distributions, feedback."""

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_servers import FakeServer, chat_server, say
from hf_models import write_model
from jobs import on_two_ranks
from tiny_runs import tiny_config, tiny_run

from r1pipe.chat.answerer import Spent
from r1pipe.chat.template import Chat
from r1pipe.config import DistillConfig, ParentRef, to_mapping
from r1pipe.config.compose import compose
from r1pipe.config.distill_methods import EXTRACTS, METHODS, TRANSFERS
from r1pipe.config.distill_unused import unused_keys
from r1pipe.config.groups import flat
from r1pipe.core.errors import CheckpointError, ConfigError, DataError
from r1pipe.core.paths import RunFolder
from r1pipe.core.types import Completion, Prompt
from r1pipe.launch.watch import resume_hint
from r1pipe.model import load_pretrained
from r1pipe.runs import checkpoints, lineage, samples, servers
from r1pipe.runs.files import write_json
from r1pipe.runs.lineage.published import adopt
from r1pipe.train.distill.on_policy import TeacherScorer
from r1pipe.train.distill.transfer import prompts_of
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.extract import feedback
from r1pipe.train.extract.alignment import TopK, aligned, pieces_of, unknown
from r1pipe.train.extract.answers import scored, with_majority
from r1pipe.train.extract.curate import passages
from r1pipe.train.extract.dataset import Kept, read_rows
from r1pipe.train.extract.distribution import in_turn, read_by_teacher
from r1pipe.train.extract.expand import listed
from r1pipe.train.extract.extract import extract
from r1pipe.train.extract.feedback import rating
from r1pipe.train.extract.problems import Problems, WordIndex, rouge_l
from r1pipe.train.extract.served import Journal
from r1pipe.train.extract.stored import ROWS, Stored, check_stored, write_stored
from r1pipe.train.extract.teacher import TeacherGenerator
from r1pipe.train.extract.work import Work
from r1pipe.train.run import open_run

ALL = ["stage.filters.correct_only=false", "stage.filters.well_formed=false"]
SMALL = ["stage=distill", "stage.prompts=6"]
SERVED = ["stage.teacher.retries=0", "stage.teacher.parallel=2"]
DIVERGENCE = ["stage.extract=distribution", "stage.transfer=divergence", "stage.distribution.top_k=5"]
LAPTOP = ["recipe=smoke", "engine.ranks=1", "engine.threads=1", "stage.sampling.max_tokens=48"]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "BACKOFF_S", 0.01)


def extracted(folder: Path, *words: str, weights: ParentRef | None = None, **more: Any) -> list[dict]:
    """The rows of a run's dataset, `top` being the stored probabilities; nothing is trained."""
    if not folder.exists():
        served = SERVED if any(word.startswith("teacher=http") for word in words) else []
        few = SMALL[:1] if "stage.extract=curate" in words else SMALL
        tiny_run(folder, *few, *served, *words, weights=weights, **more)
    with open_run(folder) as run:
        run.load_chat(), run.load_data()
        path, _ = extract(run, Ranks(run.config.engine))  # type: ignore[arg-type]
        beside = run.folder.distributions
    stored = Stored(beside) if beside.exists() else None
    rows = read_rows(path)
    for row in rows:
        place = row.pop("distribution")
        row["top"] = None if place is None or stored is None else [of.tolist() for of in stored[place]]
    return rows


def top_of(row: dict[str, Any]) -> TopK:
    return TopK(*map(np.array, row["top"]))


def funnel(folder: Path) -> dict[str, int]:
    return {step["name"]: step["dropped"] for step in json.loads((folder / "data/funnel.json").read_text())}


def asked(served: FakeServer) -> list[str]:
    return [body["messages"][-1]["content"] for body in served.requests]


def thought(text: str) -> str:
    return f"<think>\nWe look at it.\n</think>\n\n{text}"


# --- the table of methods


def test_every_method_is_allowed_or_refused_with_a_reason() -> None:
    assert list(METHODS) == [(extract, transfer) for extract in EXTRACTS for transfer in TRANSFERS]

    def told(source: str, transfer: str, teacher: str) -> str:
        words = [f"stage.extract={source}", f"stage.transfer={transfer}", f"teacher={teacher}"]
        topics = ["stage.curate.topics=[tea]"] if source == "curate" else []
        try:
            tiny_config("stage=distill", *topics, *words)
        except ConfigError as error:
            return str(error)
        return ""

    for (source, transfer), method in METHODS.items():
        refused = (
            f"stage.extract={source} stage.transfer={transfer} is not a distillation method: {method.text}"
        )
        assert told(source, transfer, "base") == ("" if method.supported else refused)
        if method.supported and method.live:
            assert "give teacher=CHECKPOINT" in told(source, transfer, "http://host/v1")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["stage.extract=expand"], "needs a teacher to ask; give teacher="),
        (["stage.transfer=divergence"], "give teacher=CHECKPOINT"),
        (["teacher=http://h/v1", "stage.transfer=divergence"], "give teacher=CHECKPOINT"),
        (["teacher=http://u:p@h/v1"], "holds a user or password"),
        (
            ["teacher=http://h/v1", "stage.extract=expand"],
            "stage.expand.way=continue needs the teacher's weights",
        ),
        (["teacher=x", "stage.extract=curate"], "needs stage.curate.topics"),
        (
            ["teacher=x", "stage.extract=curate", "stage.curate.documents=a.txt"],
            "stage.curate.documents needs stage.curate.way=ask",
        ),
        (["teacher=x", "stage.templates.topic=tea"], "stage.templates.topic has no {topic}"),
        (["teacher=x", "stage.templates.evolve={a: b}"], "stage.templates.evolve.a has no {problem}"),
        (["teacher=x", "stage.sampling.max_tokens=4096"], "stage.sampling.max_tokens=4096 is longer than"),
        (["teacher=x", "stage.sampling.top_p=0"], "leaves nothing to draw"),
        (["teacher=x", "stage.reads=[rejection_sft]"], "stage.reads=[rejection_sft] would not be used"),
        (
            [
                *("teacher=http://h/v1", "stage.reads=[rejection_sft]"),
                *("stage.extract=distribution", "stage.transfer=divergence"),
            ],
            "a server tells probabilities of its own answers alone",
        ),
        (["teacher=x", "stage.extract=expand", "stage.samples_per_prompt=1"], "what several agree on"),
        (
            ["teacher=x", "stage.extract=feedback", "stage.transfer=rl", "stage.feedback.by=correction"],
            "scores nothing",
        ),
        (
            ["teacher=x", "stage.extract=feedback", "stage.transfer=ranking", "stage.samples_per_prompt=1"],
            "compares answers",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        tiny_config("stage=distill", *words)
    assert told in str(refused.value) and "\n" not in str(refused.value)


# Every method, and what changes which keys it reads.
EVERY_METHOD = [
    [f"stage.extract={extract}", f"stage.transfer={transfer}", teacher]
    for (extract, transfer), method in METHODS.items()
    for teacher in ("teacher=base", *([] if method.live else ["teacher=http://h/v1"]))
    if method.supported
    and extract != "curate"
    and not ("http" in teacher and extract in ("expand", "feedback"))
]
EVERY_METHOD += [
    [f"stage.extract={extract}", key, "teacher=x"]
    for extract, key in (
        ("expand", "stage.expand.way=self_instruct"),
        ("expand", "stage.expand.way=evolve"),
        ("feedback", "stage.feedback.by=rubric"),
        ("feedback", "stage.feedback.by=correction"),
    )
]
EVERY_METHOD += [
    ["stage.extract=curate", f"stage.curate.way={way}", "stage.curate.topics=[tea]", "teacher=x"]
    for way in ("ask", "continue")
]
EVERY_METHOD += [
    ["stage.extract=curate", "stage.curate.way=ask", "stage.curate.documents=a.txt", "teacher=x"],
    ["stage.transfer=divergence", "stage.divergence.kind=jensen_shannon", "teacher=x"],
    ["stage.transfer=divergence", "stage.divergence.kind=forward_kl", "teacher=x"],
    ["stage.extract=distribution", "stage.transfer=divergence", "stage.distribution.live=true", "teacher=x"],
    [],
]


def test_every_key_is_read_by_some_method_and_those_that_are_said_to_be_unused_are_keys() -> None:
    known, read, unused = set[str](), set[str](), set[str]()
    for words in EVERY_METHOD:
        config = tiny_config("stage=distill", *words)
        keys = {key.removeprefix("stage.") for key, _ in flat(to_mapping(config)) if key.startswith("stage.")}
        names = {name for named, _ in unused_keys(config.stage, config.teacher) for name in named}
        read |= {key for key in keys if not any(f"{key}.".startswith(f"{name}.") for name in names)}
        known |= keys
        unused |= names
    assert known == read
    assert not [name for name in unused if not any(f"{key}.".startswith(f"{name}.") for key in known)]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["stage.prompts=5"], "stage.prompts would change nothing: it needs teacher="),
        (["teacher=x", "stage.expand.shots=2"], "it is of stage.extract=expand"),
        (["teacher=x", "stage.teacher.parallel=2"], "it is of a server"),
        (["teacher=x", "stage.templates.rubric='{question}{answer}'"], "reads no template"),
        (["teacher=x", "stage.transfer=rl", "stage.epochs=2"], "give stage.max_steps"),
        (
            [
                *("teacher=x", "stage.transfer=divergence"),
                *("stage.divergence.kind=forward_kl", "stage.divergence.beta=0.1"),
            ],
            "stage.divergence.kind=jensen_shannon",
        ),
        (
            ["teacher=x", "stage.extract=feedback", "stage.transfer=rl", "stage.filters.per_prompt=2"],
            "nothing is filtered",
        ),
    ],
)
def test_a_key_that_the_method_does_not_read_is_refused_in_one_line(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match="would change nothing") as refused:
        tiny_config("stage=distill", *words)
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_a_teacher_is_for_distillation_and_takes_the_place_of_stored_samples() -> None:
    with pytest.raises(ConfigError, match="teacher=x is for stage=distill"):
        tiny_config("stage=grpo", "teacher=x")
    assert tiny_config("stage=distill").stage.reads == ["rejection_sft"]
    assert tiny_config("stage=distill", "teacher=x").stage.reads == []


# --- labels, from a server


def arithmetic(body: dict[str, Any]) -> tuple[int, Any]:
    """A teacher that says 7 to everything, twice in another wording."""
    texts = [thought("The answer is 7."), thought("So the answer is 7.")]
    return say(*(texts * body["n"])[: body["n"]])


def test_a_server_labels_the_datas_prompts(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with chat_server(arithmetic) as served:
        words = [f"teacher={served.url}", *ALL, "stage.teacher.licence=MIT", "stage.samples_per_prompt=2"]
        prices = [f"stage.teacher.usd_per_million_{kind}_tokens=1000" for kind in ("prompt", "completion")]
        rows = extracted(folder, *words, *prices)
        requests = len(served.requests)
    assert len(rows) == 6 and requests == 6, "the second answer to each prompt has the same thought"
    assert funnel(folder)["duplicates"] == 6
    assert {row["source"] for row in rows} == {f"teacher:{served.url}/v1 m"}
    assert {(row["teacher_version"], row["licence"], row["checkpoint_hash"]) for row in rows} == {
        ("m", "MIT", None)
    }
    assert all(row["seed"] and "overlap with evaluation" in json.loads(row["filters"]) for row in rows)
    assert not any("correct" in json.loads(row["filters"]) for row in rows), "it was not asked for"
    facts = json.loads((folder / "teacher.json").read_text())
    assert (facts["kind"], facts["licence"], facts["prompts"], facts["requests"]) == ("server", "MIT", 6, 6)
    assert facts["usd"] == pytest.approx((6 * 10 + 6 * 8) / 1000)
    assert extracted(folder) == rows, "the server is gone, and not needed"


def test_wrong_answers_are_dropped_and_nothing_left_is_an_error(tmp_path: Path) -> None:
    with chat_server(arithmetic) as served, pytest.raises(SystemExit) as ended:
        extracted(tmp_path / "run", f"teacher={served.url}", "stage.prompts=4")
    told = (tmp_path / "run" / "error.txt").read_text()
    assert ended.value.code == 2 and told.count("\n") == 1
    assert "8 dropped by 'correct'" in told and "loosen stage.filters" in told


def test_a_lost_server_is_one_line_and_what_it_answered_is_not_asked_again(tmp_path: Path) -> None:
    folder, left = tmp_path / "run", 4

    def until_lost(body: dict[str, Any]) -> tuple[int, Any]:
        nonlocal left
        left -= 1
        return arithmetic(body) if left >= 0 else (500, "out of memory")

    with chat_server(until_lost) as served:
        words = [f"teacher={served.url}", *ALL, "stage.samples_per_prompt=1", "stage.teacher.parallel=1"]
        with pytest.raises(SystemExit) as ended:
            extracted(folder, *words)
        told = (folder / "error.txt").read_text()
        assert ended.value.code == 2 and told.count("\n") == 1 and "out of memory" in told
        assert resume_hint(RunFolder(folder)).startswith("4 answers are kept, and the same command goes on")
        assert checkpoints.holds_work(RunFolder(folder))
        left, before = 100, len(served.requests)
        rows = extracted(folder)
    assert len(rows) == 6 and len(served.requests) - before == 2
    assert json.loads((folder / "teacher.json").read_text())["requests"] == 6, "of both sessions"
    assert not [*folder.rglob("data/shards/*/*.jsonl")], "shards are whole"


def test_a_slow_answer_holds_no_other_up_and_the_order_stays(tmp_path: Path) -> None:
    """The first request is answered after 20 others, which are more than a shard's."""
    others, lock, first = threading.Event(), threading.Lock(), []

    def slow_first(body: dict[str, Any]) -> tuple[int, Any]:
        with lock:
            first.append(body)
            is_first = len(first) == 1
            if len(first) == 21:
                others.set()
        if is_first and not others.wait(60):
            return 500, "nobody else was answered"
        return say(thought(f"The answer is {body['seed']}."))

    words = [*ALL, "stage.samples_per_prompt=1", "stage.prompts=30", "stage.filters.max_repetition=1"]
    with chat_server(slow_first) as served:
        rows = extracted(tmp_path / "slow", f"teacher={served.url}", *words)
    assert len(first) == 30 and len([*(tmp_path / "slow").rglob("data/shards/*/*.parquet")]) == 2
    with chat_server(lambda body: say(thought(f"The answer is {body['seed']}."))) as served:
        again = extracted(tmp_path / "again", f"teacher={served.url}", *words)
    assert [row["response"] for row in rows] == [row["response"] for row in again]
    assert [row["question"] for row in rows] == [row["question"] for row in again]


def test_a_journal_keeps_bytes_and_leaves_out_what_a_kill_has_cut_off(tmp_path: Path) -> None:
    shard = tmp_path / "1-of-2.parquet"
    rows = [{"text": "é", "likely": [{"piece": b"\xc3", "top": [b"\xa9", b"a"], "logprobs": [-0.1, -3.0]}]}]
    Journal(shard).add(4, rows, Spent(requests=1, usd=0.5))
    with shard.with_suffix(".jsonl").open("a") as file:
        file.write('{"item": 6, "ro')
    again = Journal(shard)
    assert again.rows == {4: rows} and again.spent == Spent(requests=1, usd=0.5)
    again.add(6, rows, Spent(requests=2))
    assert {*Journal(shard).rows} == {4, 6} and Journal(shard).spent.requests == 3


# --- expansion


def test_rouge_l_is_what_its_definition_says() -> None:
    def slow(one: list[str], other: list[str]) -> int:
        table = np.zeros((len(one) + 1, len(other) + 1), int)
        for i, a in enumerate(one):
            for j, b in enumerate(other):
                table[i + 1, j + 1] = table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
        return int(table[-1, -1])

    rng = np.random.default_rng(0)
    for _ in range(50):
        one, other = (rng.choice([*"abcd"], int(rng.integers(1, 90))).tolist() for _ in range(2))
        assert rouge_l(one, other) == pytest.approx(2 * slow(one, other) / (len(one) + len(other)))
    assert rouge_l([], []) == 1.0


@pytest.mark.parametrize("similarity", [0.0, 0.3, 0.7, 0.9])
def test_near_copies_are_those_that_a_comparison_with_every_text_finds(similarity: float) -> None:
    rng = np.random.default_rng(0)
    texts = [rng.choice([*"aabbcdefghij"], int(rng.integers(1, 25))).tolist() for _ in range(300)]
    texts += [[*text[:3], "k", *text[4:]] for text in texts[:100]]
    index = WordIndex()
    known: list[list[str]] = []
    copies = 0
    for text in texts:
        expected = [other for other in known if rouge_l(text, other) >= similarity]
        found = [other for other in index.alike(text, similarity) if rouge_l(text, other) >= similarity]
        assert found == expected
        copies += bool(found)
        index.add(text)
        known.append(text)
    assert copies > 50, "the test sees some"


def test_new_problems_are_new() -> None:
    known = "Tom has 3 apples and buys 4 more. How many apples does he have?"
    problems = Problems([known], ["What is the capital of France today, please?"], 5, 0.7, (4, 30))

    def why(text: str, like: str | None = None) -> str | None:
        before = {name: len(texts) for name, texts in problems.funnel.dropped.items()}
        if problems.add(text, "teacher:t", "MIT", like):
            return None
        after = problems.funnel.dropped
        return next(name for name, texts in after.items() if len(texts) > before.get(name, 0))

    assert why("  !?  ") == "no problem"
    assert why("Why so?") == "length" and why("word " * 31) == "length"
    assert why("Here is the rewritten problem that you wanted to have") == "talks about the request"
    assert why("Tom has 5 apples and buys 9 more. How many apples does he have?") == "near copies"
    assert why("Now tell me: what is the capital of France today?") == "evaluation questions"
    assert why("A train leaves at noon and drives 80 km an hour. When is it 200 km away?") is None
    assert why("A train leaves at noon and drives 80 km an hour. When is it 200 km away?") == "near copies"
    harder = known.replace("more.", "more, then gives 2 away.")
    assert why(harder, like=known) is None, "a rewritten problem may be like its own source"
    assert [prompt.task for prompt in problems.prompts] == ["made_up"] * 2
    assert problems.prompts[0].source == "teacher:t" and problems.prompts[0].language == "en"
    by_words = Problems([known], [], 0, 1.0, (4, 30))
    assert by_words.add("Tom has 5 apples and buys 9 more. How many apples does he have?", "", None)


@pytest.mark.parametrize(
    ("reply", "truncated", "found"),
    [
        ("What is 2+2?\n\nProblem 10: And 3+3?", False, ["What is 2+2?", "And 3+3?"]),
        ("**Problem 9:** What is 2+2?\nProblem 10. And 3", True, ["What is 2+2?"]),
        ("", False, []),
    ],
)
def test_a_list_that_goes_on_is_read(reply: str, truncated: bool, found: list[str]) -> None:
    assert listed(reply, truncated) == found


def inventor(body: dict[str, Any]) -> tuple[int, Any]:
    """A teacher that makes up problems in turn, and solves everything alike but for every third answer."""
    text = body["messages"][-1]["content"]
    if "Come up with" in text or "brand-new" in text or "Rewrite the given" in text:
        number = sum(map(ord, text)) % 97
        animals, verbs = ("fox", "heron", "mole", "newt")[number % 4], ("digs", "swims", "naps")[number % 3]
        heading = "" if "Come up with" in text else "Rewritten problem: "
        return say(
            f"{heading}A {animals} {verbs} for {number} minutes and {len(text)} seconds. How long is it?"
        )
    return say(*[thought(f"The answer is {7 if i % 3 else 8}.") for i in range(body["n"])])


@pytest.mark.parametrize("way", ["self_instruct", "evolve"])
def test_a_server_expands_problems_in_rounds(way: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = [
        "stage.extract=expand",
        f"stage.expand.way={way}",
        "stage.expand.problems=5",
        "stage.expand.rounds=4",
    ]
    more = [
        "stage.samples_per_prompt=3",
        "stage.expand.max_similarity=0.95",
        "stage.filters.min_agreement=0.6",
    ]
    with chat_server(inventor) as served:
        rows = extracted(folder, f"teacher={served.url}", *words, *more)
    assert rows and len({row["question"] for row in rows}) <= 5
    assert {row["answer"] for row in rows} == {"7"}, "what two of three answers agree on"
    assert {row["prompt_source"] for row in rows} == {f"teacher:{served.url}/v1 m"}
    assert funnel(folder)["correct"] == len({row["question"] for row in rows}), "and the third is dropped"
    requests = [text for text in asked(served) if "answer" in text and "problem" in text.lower()]
    examples = requests[0].count("Problem ")
    assert (examples == 7) if way == "self_instruct" else "{problem}" not in requests[0]


def test_a_majority_is_more_than_one_voice() -> None:
    prompt = Prompt("a", "made_up", "en", "What is 3+4?")

    def gold(*stated: str) -> str:
        answers = [Completion([], [], "stop", thought(f"The answer is {text}.")) for text in stated]
        return with_majority(prompt, answers, 0.5).answer

    assert gold("7", "7", "8") == "7" and gold("7", "8") == "" and gold("7") == ""
    assert gold("7", "7", "1", "2", "3") == "", "less than half"
    drawn = scored([(prompt, [Completion([], [], "stop", thought("The answer is 7."))] * 2)], 0.5)
    assert [one.scores["accuracy"].value for one in drawn] == [1.0, 1.0]
    [alone] = scored([(prompt, [Completion([], [], "stop", thought("The answer is 7."))])], 0.5)
    assert alone.scores["accuracy"].value == 0.0


# --- curation


def test_documents_are_cut_into_passages(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("one two\nthree\n\nfour five\n\n\nsix " + "seven " * 7 + "\n", encoding="utf-8")
    found = [*passages(text, 5)]
    assert [passage.text for passage in found] == [
        "one two three four five",
        "six" + " seven" * 4,
        "seven seven seven",
    ]
    assert [passage.source for passage in found] == ["a.txt:1", "a.txt:7", "a.txt:7"]
    rows = tmp_path / "b.jsonl"
    rows.write_text('{"text": "one"}\n\n{"text": "two", "id": 2}\n', encoding="utf-8")
    assert [(p.text, p.source) for p in passages(rows, 5)] == [("one", "b.jsonl:1"), ("two", "b.jsonl:3")]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("gone.txt", None, "cannot be read"),
        ("a.txt", b"  \n", "is empty"),
        ("a.txt", b"\xff\xfe\x00", "is not UTF-8 (byte 0)"),
        ("a.jsonl", b'{"text": "x"}\n{"te', "a.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', "a.jsonl:1 has no text in a column `text`"),
    ],
)
def test_bad_documents_are_named(name: str, content: bytes | None, told: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as refused:
        [*passages(tmp_path / name, 5)]
    assert told in str(refused.value) and "\n" not in str(refused.value)


def librarian(body: dict[str, Any]) -> tuple[int, Any]:
    text = body["messages"][-1]["content"]
    if "Write one question" in text:
        subject = text.split()[-1].strip(".")
        return say(*[f"Why do people in {subject} like the number {n} so much?" for n in range(body["n"])])
    return say(*[thought("It brings them luck.")] * body["n"])


def test_topics_and_documents_become_questions_with_answers(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("A town by the sea is Bree.\n\nIn the hills lies Dale.", encoding="utf-8")
    base = ["stage.extract=curate", "stage.curate.way=ask", "stage.samples_per_prompt=1"]
    with chat_server(librarian) as served:
        base.append(f"teacher={served.url}")
        topics = extracted(
            tmp_path / "one", *base, "stage.curate.topics=[Rome,Oslo]", "stage.curate.questions_per_topic=2"
        )
        served.requests.clear()
        of_book = ["stage.curate.questions_per_passage=1", "stage.curate.passage_words=8"]
        documents = extracted(tmp_path / "two", *base, f"stage.curate.documents={book}", *of_book)
        answered = [text for text in asked(served) if text.startswith("Answer the question")]
    assert {row["question"] for row in topics} == {
        f"Why do people in {c} like the number {n} so much?" for c in ("Rome", "Oslo") for n in (0, 1)
    }
    assert {(row["kind"], row["task"], row["answer"]) for row in topics} == {("general", "curated", "")}
    assert [row["prompt_source"] for row in documents] == ["book.txt:1", "book.txt:3"]
    assert len(answered) == 2 and "A town by the sea is Bree." in answered[0] + answered[1]
    assert not any("Passage" in row["question"] for row in documents), "the student does not see it"


# --- distributions


def test_a_local_teachers_probabilities_are_its_own(tmp_path: Path) -> None:
    words = [*ALL, "stage.extract=distribution", "stage.transfer=divergence", "stage.distribution.top_k=5"]
    folder, teacher = tmp_path / "run", lineage.bundled()
    rows = extracted(folder, *words, "stage.sampling.max_tokens=24", teacher=teacher)
    model, chat = load_pretrained(teacher.checkpoint).eval(), Chat.load(teacher.checkpoint)
    for row in rows[:3]:
        prompt = replace(samples.prompt_of(row), id="")
        example = chat.example(prompt, row["response"])
        with torch.no_grad():
            logits_TV = model(torch.tensor([example.tokens]))[0].float()
        learned = torch.tensor(example.loss)[1:]
        expected = logits_TV[:-1][learned].log_softmax(-1)
        top = top_of(row)
        assert top.ids_TK.shape == (int(learned.sum()), 5)
        found = expected.gather(1, torch.from_numpy(top.ids_TK).long())
        shares, expected_TK = np.exp(top.logprobs_TK.astype(float)), found.exp().numpy()
        assert np.allclose(shares, expected_TK, atol=1e-2)  # the base is in bfloat16
        assert torch.equal(found[:, 0], expected.max(1).values), "the likeliest comes first"
        mass = shares.sum(1) + np.exp(top.rest_T.astype(float))
        assert np.allclose(mass, 1, atol=5e-3)
    assert extracted(folder) == rows


def test_the_samples_of_a_run_can_be_read_and_live_teachers_store_nothing(tmp_path: Path) -> None:
    words = ["stage.extract=distribution", "stage.transfer=divergence", *ALL]
    made = tmp_path / "distill-s0-1"
    live = [*words, "stage.distribution.live=true", "stage.sampling.max_tokens=16"]
    rows = extracted(made, *live, teacher=lineage.bundled())
    assert rows and all(row["top"] is None for row in rows)
    alone = ["stage.extract=distribution", "stage.transfer=rl"]
    prompts = extracted(tmp_path / "prompts", *alone, teacher=lineage.bundled())
    assert len(prompts) == 6 and {row["response"] for row in prompts} == {""}
    assert all(row["answer"] and row["licence"] == "Apache-2.0" for row in prompts)
    assert {
        prompt.licence for prompt in prompts_of(tmp_path / "prompts" / "data" / "samples.parquet", True)
    } == {"Apache-2.0"}


def test_probabilities_are_written_in_parts_and_mapped(tmp_path: Path) -> None:
    rng, path = np.random.default_rng(0), tmp_path / "distributions.arrow"
    tops: list[TopK | None] = [None, unknown(2, 3)]
    for length in rng.integers(1, 9, 3 * ROWS):
        ids = rng.integers(-1, 9, (length, 3)).astype(np.int32)
        ids[0, 0] = 4
        values = rng.random((length, 4)).astype(np.float16)
        tops.append(TopK(ids, values[:, :3], values[:, 3]))
    rows = write_stored(path, enumerate(tops))
    stored = Stored(path)
    assert [*rows] == [*range(2, len(tops))] and len(stored) == len(rows), "unknown ones are left out"
    for number, row in rows.items():
        expected = tops[number]
        assert expected is not None and stored.tokens(row) == len(expected.rest_T)
        assert stored.known(row) == (expected.ids_TK >= 0).any(1).sum()
        for found, of in zip(stored[row], expected, strict=True):
            assert found.dtype == of.dtype and np.array_equal(found, of) and not found.flags.owndata
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match=r"distributions\.arrow cannot be read"):
        Stored(path)


def test_probabilities_that_are_not_the_datasets_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = [*DIVERGENCE, *ALL, "stage.sampling.max_tokens=48"]
    extracted(folder, *words, teacher=lineage.bundled())
    paths = folder / "data" / "distributions.arrow", folder / "data" / "samples.parquet"
    check_stored(*paths)
    paths[0].write_bytes(b"0" + paths[0].read_bytes())
    with pytest.raises(SystemExit):
        extracted(folder)
    assert "has changed; remove data/samples.parquet" in (folder / "error.txt").read_text()


def test_one_text_in_two_tokenizers() -> None:
    ids = {b"a": 1, b"b": 2, b"ab": 3, b" c": 4}
    likely = [[(b"a", np.log(0.5)), (b"ab", np.log(0.25)), (b"zz", np.log(0.2))], [(b"b", np.log(0.9))], []]
    found = aligned([b"a", b"b", b" c"], [b"<", b"a", b"b", b" ", b"c"], [[], *likely, [], []], ids, 2)
    assert found is not None
    assert found.ids_TK.tolist() == [[1, 3], [2, -1], [-1, -1]]
    assert np.exp(found.rest_T.astype(float)) == pytest.approx([0.25, 0.1, 1.0], abs=1e-3)
    assert aligned([b"a"], [b"b"], [[]], ids, 2) is None
    split = aligned([b"ab"], [b"a", b"b"], likely[:2], ids, 2)
    assert split is not None and (split.ids_TK == -1).all() and split.rest_T.tolist() == [0.0]


def test_pieces_are_the_bytes_of_a_text() -> None:
    chat = Chat.load(lineage.bundled().checkpoint)
    pieces = pieces_of(chat.tokenizer)
    for text in ("The answer is 12.", "小明有3个苹果，", "<think>\nx\n</think>\n\né"):
        assert b"".join(pieces[token] for token in chat.encode(text)) == text.encode()


def test_a_teacher_with_another_tokenizer_is_read_where_the_tokens_meet(tmp_path: Path) -> None:
    other = write_model(tmp_path / "qwen", "qwen2")
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][: len(content["model"]["merges"]) // 2]
    (other / "tokenizer.json").write_text(json.dumps(content))
    folder = tiny_run(tmp_path / "run", *SMALL, *DIVERGENCE, teacher=adopt(other, tmp_path))
    rows = [Kept(Prompt("a", "word", "en", "3+4?"), text, {}) for text in (thought("Answer: 7"), "4 " * 999)]
    with open_run(folder) as run:
        chat, ranks = run.load_chat(), Ranks(run.config.engine)
        work = Work(run, ranks, TeacherGenerator(run, ranks), [])  # type: ignore[arg-type]
        (_, top), (_, too_long) = in_turn(read_by_teacher(work, rows))
    assert too_long is None and top is not None
    assert len(top.rest_T) == len(chat.encode(rows[0].response)) + 1
    mass = np.exp(top.logprobs_TK.astype(float)).sum(1) + np.exp(top.rest_T.astype(float))
    assert np.allclose(mass, 1, atol=5e-3)
    known = top.ids_TK[:, 0] >= 0
    assert 0 < known.sum() < len(known), "some tokens meet, not all"
    assert (top.rest_T[~known] == 0).all() and known[-1], "after the last token, too"


def test_a_servers_probabilities_are_of_the_students_tokens(tmp_path: Path) -> None:
    chat = Chat.load(lineage.bundled().checkpoint)
    pieces = pieces_of(chat.tokenizer)
    text = thought("The answer is 7.")

    def with_probabilities(body: dict[str, Any]) -> tuple[int, Any]:
        assert body["logprobs"] is True and body["top_logprobs"] == 3
        status, reply = say(text)
        tokens = [{"token": "?", "bytes": [*pieces[token]]} for token in chat.encode(text)]
        top = [[{**token, "logprob": -0.5}, {"token": " never", "logprob": -2.0}] for token in tokens]
        content = [
            {**token, "logprob": -0.5, "top_logprobs": t} for token, t in zip(tokens, top, strict=True)
        ]
        reply["choices"][0]["logprobs"] = {"content": content}
        return status, reply

    words = [*ALL, "stage.extract=distribution", "stage.transfer=divergence", "stage.distribution.top_k=3"]
    with chat_server(with_probabilities) as served:
        rows = extracted(tmp_path / "run", f"teacher={served.url}", *words, "stage.samples_per_prompt=1")
    for row in rows:
        top = top_of(row)
        assert top.ids_TK[:-1, 0].tolist() == chat.encode(text)
        assert np.allclose(top.logprobs_TK[:-1, 0].astype(float), -0.5)
        assert np.allclose(np.exp(top.rest_T[:-1].astype(float)), 1 - np.exp(-0.5), atol=1e-2)
        assert top.ids_TK[-1].tolist() == [-1] * 3 and top.rest_T[-1] == 0, "no server tells the end"
    with chat_server(arithmetic) as served, pytest.raises(SystemExit):
        extracted(tmp_path / "none", f"teacher={served.url}", *words, "stage.samples_per_prompt=1")
    assert "dropped by 'probabilities of the student's tokens'" in (tmp_path / "none/error.txt").read_text()


# --- feedback


def answering(folder: Path, *words: str, **more: Any) -> list[dict]:
    """Feedback on answers of the bundled base, which is the student here."""
    config = compose(["stage=distill", *LAPTOP, "stage.prompts=4", "stage.extract=feedback", *words]).config
    folder.mkdir()
    write_json(folder / "config.json", to_mapping(replace(config, weights_from=lineage.bundled(), **more)))
    return extracted(folder)


def critic(body: dict[str, Any]) -> tuple[int, Any]:
    """It likes answers of an even length, and corrects any to the same."""
    text = body["messages"][-1]["content"]
    if text.startswith("Correct"):
        return say(thought("The answer is 7."))
    answer = text.rpartition("Answer:\n")[2]
    return say(
        "I cannot tell." if len(answer) % 5 == 0 else f"Fine. Score: {9 if len(answer) % 2 == 0 else 3}"
    )


def test_a_server_rates_the_students_answers(tmp_path: Path) -> None:
    with chat_server(critic) as served:
        teacher = [f"teacher={served.url}", "stage.feedback.by=rubric"]
        rows = answering(tmp_path / "all", *teacher, "stage.transfer=ranking")
        best = answering(tmp_path / "best", *teacher, *ALL, "stage.filters.min_language_consistency=0")
    assert rows and {round(row["score"], 2) for row in rows} <= {0.9, 0.3}
    for row in rows:
        assert round(row["score"], 2) == (0.9 if len(row["response"]) % 2 == 0 else 0.3)
        assert row["source"] == "sampled:bundled" and row["teacher"] is None
        assert row["licence"] == "Apache-2.0", "the prompt's, as of every sample that a policy draws"
        assert row["judge"] == f"{served.url}/v1 m m"
    unread = funnel(tmp_path / "all")["no score"]
    assert len(rows) + unread == 8
    assert all(len(row["response"]) % 2 == 0 and row["score"] is None for row in best)


def test_what_ratings_cost_while_a_student_is_reinforced_is_written_down(tmp_path: Path) -> None:
    folder, words = tmp_path / "run", ["stage.feedback.by=rubric", "stage.transfer=rl"]
    with chat_server(critic) as served:
        rows = answering(folder, f"teacher={served.url}", *words)
        assert not served.requests, "prompts alone cost nothing"
        with open_run(str(folder), DistillConfig) as run:
            run.load_chat()
            scorer, prompt = TeacherScorer(run, 1.0), samples.prompt_of(rows[0])
            found = [scorer.score([prompt], [Completion([], [], "stop", text)]) for text in ("abcdef", "abc")]
            scorer.finish()
        seeds = {body["seed"] for body in served.requests}
    assert [score.value for [score] in found] == [0.9, 0.3]
    assert len(seeds) == 2, "each step's ratings are drawn anew"
    facts = json.loads((folder / "teacher.json").read_text())
    assert (facts["requests"], facts["prompts"]) == (2, len({row["prompt_id"] for row in rows}))
    assert facts["prompt_tokens"] > 0


def test_a_server_corrects_the_students_answers(tmp_path: Path) -> None:
    with chat_server(critic) as served:
        teacher = [f"teacher={served.url}", "stage.feedback.by=correction", *ALL]
        rows = answering(tmp_path / "sft", *teacher)
        pairs = answering(tmp_path / "ranking", *teacher, "stage.transfer=ranking")
    assert {row["response"] for row in rows} == {thought("The answer is 7.")}
    assert {row["teacher"] for row in rows} == {f"{served.url}/v1 m"}
    better, worse = pairs[::2], pairs[1::2]
    assert [row["prompt_id"] for row in better] == [row["prompt_id"] for row in worse]
    assert {row["score"] for row in better} == {1.0} and {row["score"] for row in worse} == {0.0}
    assert {(row["source"], row["licence"]) for row in worse} == {("sampled:bundled", "Apache-2.0")}
    assert {row["licence"] for row in better} == {None}, "what the teacher wrote has the teacher's"
    assert [row["pair"] for row in better] == [row["pair"] for row in worse]


def test_equal_corrections_of_two_answers_keep_the_answer_that_each_corrects(tmp_path: Path) -> None:
    own = [Completion([], [], "stop", text) for text in ("first", "second")]
    with chat_server(critic) as served, pytest.MonkeyPatch.context() as patch:
        patch.setattr(feedback, "students_answers", lambda work, prompts: [own])
        teacher = [f"teacher={served.url}", "stage.feedback.by=correction", *ALL, "stage.prompts=1"]
        rows = answering(tmp_path / "run", *teacher, "stage.transfer=ranking")
    assert [row["response"] for row in rows] == [thought("The answer is 7."), "first"], "the other is a copy"


def test_likelihood_ranks_the_students_answers(tmp_path: Path) -> None:
    words = ["teacher=base", "stage.feedback.by=likelihood", "stage.transfer=ranking"]
    rows = answering(tmp_path / "run", *words, teacher_from=lineage.bundled())
    assert len(rows) == 8 and all(0 < row["score"] <= 1 for row in rows)
    model, chat = (
        load_pretrained(lineage.bundled().checkpoint).eval(),
        Chat.load(lineage.bundled().checkpoint),
    )
    example = chat.example(samples.prompt_of(rows[0]), rows[0]["response"])
    with torch.no_grad():
        logits_TV = model(torch.tensor([example.tokens]))[0].float()
    logprobs_T = logits_TV[:-1].log_softmax(-1).gather(1, torch.tensor(example.tokens[1:])[:, None])[:, 0]
    mean = logprobs_T[torch.tensor(example.loss)[1:]].mean().exp().item()
    assert rows[0]["score"] == pytest.approx(mean, rel=2e-3)  # the base is in bfloat16


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Score: 7", 0.7),
        ("**Score:** 10\n", 1.0),
        ("Score: 3 ... Score: 4.5", 0.45),
        ("Score: 11", None),
        ("", None),
    ],
)
def test_ratings_are_read(text: str, score: float | None) -> None:
    assert rating(text) == score


# --- ranks


@pytest.mark.slow
def test_two_ranks_share_the_work_and_find_what_one_finds(tmp_path: Path) -> None:
    base = lineage.bundled()
    ways: dict[str, list[str]] = {
        "distribution": [*DIVERGENCE, *ALL],
        "expand": ["stage.extract=expand", "stage.expand.problems=6", "stage.expand.rounds=2", *ALL],
    }
    small = [*SMALL, "stage.sampling.max_tokens=24", "stage.sampling.max_num_seqs=2"]
    alone = {}
    for name, words in ways.items():
        alone[name] = extracted(tmp_path / "one" / name, *small, *words, teacher=base)
        folder = tiny_run(tmp_path / f"distill-{name}", *small, *words, teacher=base)
        config = json.loads((folder / "config.json").read_text())
        config["engine"]["ranks"] = 2
        write_json(folder / "config.json", config)
    found = on_two_ranks("two_ranks_extract.py", tmp_path)
    for name, rows in alone.items():
        expected = json.loads(json.dumps(rows, default=float))
        for row in expected + found[f"distill-{name}"]:
            if row["top"]:  # probabilities of another batch: within rounding
                row["top"][1:] = [np.round(np.exp(np.array(of, float)), 1).tolist() for of in row["top"][1:]]
        assert expected and found[f"distill-{name}"] == expected
