"""What is got out of a teacher: labels, new problems, topics and documents, distributions, feedback."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_servers import ChatServer, chat_server, say
from hf_models import write_model
from tiny_runs import tiny_config, tiny_run

from r1pipe.chat import server
from r1pipe.config import ParentRef, to_mapping
from r1pipe.config.distill import EXTRACTS, PAIRS, TRANSFERS
from r1pipe.core.errors import ConfigError, DataError
from r1pipe.core.types import Completion, Prompt
from r1pipe.model import load_pretrained
from r1pipe.runs import lineage
from r1pipe.runs.files import write_json
from r1pipe.runs.lineage.published import adopt
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.extract.alignment import aligned, pieces_of
from r1pipe.train.extract.answers import scored, with_majority
from r1pipe.train.extract.curate import passages
from r1pipe.train.extract.dataset import read_rows
from r1pipe.train.extract.distribution import stored_top
from r1pipe.train.extract.expand import listed
from r1pipe.train.extract.extract import extract
from r1pipe.train.extract.feedback import rating
from r1pipe.train.extract.problems import Problems, rouge_l
from r1pipe.train.run import open_run

ALL = ["stage.filters.correct_only=false", "stage.filters.well_formed=false"]
SMALL = ["stage=distill", "stage.prompts=6", "stage.teacher.retries=0", "stage.teacher.parallel=2"]
LAPTOP = ["recipe=smoke", "engine.ranks=1", "engine.threads=1", "stage.sampling.max_tokens=48"]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "BACKOFF_S", 0.01)


def extracted(folder: Path, *words: str, weights: ParentRef | None = None, **more: Any) -> list[dict]:
    """The rows of a run's dataset; nothing is trained."""
    if not folder.exists():
        tiny_run(folder, *SMALL, *words, weights=weights, **more)
    with open_run(folder) as run:
        run.load_chat(), run.load_data()
        path, _ = extract(run, Ranks(run.config.engine))  # type: ignore[arg-type]
    return read_rows(path)


def funnel(folder: Path) -> dict[str, int]:
    return {step["name"]: step["dropped"] for step in json.loads((folder / "data/funnel.json").read_text())}


def asked(served: ChatServer) -> list[str]:
    return [body["messages"][-1]["content"] for body in served.requests]


def thought(text: str) -> str:
    return f"<think>\nWe look at it.\n</think>\n\n{text}"


# --- the table of pairs


def test_every_pair_is_allowed_or_refused_with_a_reason() -> None:
    assert list(PAIRS) == [(extract, transfer) for extract in EXTRACTS for transfer in TRANSFERS]
    more = {"curate": ["stage.curate.topics=[tea]"], "feedback": ["stage.feedback.by=rubric"]}
    for (extract_, transfer), pair in PAIRS.items():
        words = [f"stage.extract={extract_}", f"stage.transfer={transfer}", *more.get(extract_, [])]
        if pair.runs:
            tiny_config("stage=distill", "teacher=base", *words)
            continue
        with pytest.raises(ConfigError, match="is no way to distil") as refused:
            tiny_config("stage=distill", "teacher=base", *words)
        assert pair.text in str(refused.value)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["stage.extract=expand"], "needs a teacher to ask; give teacher="),
        (["stage.transfer=divergence"], "give teacher=CHECKPOINT"),
        (["teacher=http://h/v1", "stage.transfer=divergence"], "give teacher=CHECKPOINT"),
        (["teacher=http://u:p@h/v1"], "holds a user or password"),
        (["teacher=http://h/v1", "stage.extract=expand"], "stage.expand.way=continue needs the teacher's weights"),
        (["teacher=x", "stage.extract=curate"], "needs stage.curate.topics"),
        (
            ["teacher=x", "stage.extract=curate", "stage.curate.documents=a.txt"],
            "stage.curate.documents needs stage.curate.way=ask",
        ),
        (["teacher=x", "stage.templates.topic=tea"], "stage.templates.topic has no {topic}"),
        (["teacher=x", "stage.templates.evolve={a: b}"], "stage.templates.evolve.a has no {problem}"),
        (["teacher=x", "stage.sampling.max_tokens=4096"], "stage.sampling.max_tokens=4096 is longer than"),
        (["teacher=x", "stage.sampling.top_p=0"], "leaves nothing to draw"),
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


def test_a_teacher_is_for_distillation_and_takes_the_place_of_stored_samples() -> None:
    with pytest.raises(ConfigError, match="teacher=x is for stage=distill"):
        tiny_config("stage=grpo", "teacher=x")
    assert tiny_config("stage=distill").stage.reads == ["rejection_sft"]
    assert tiny_config("stage=distill", "teacher=x").stage.reads == []
