"""`r1pipe generate` and `r1pipe chat`: every question has its own budget, and a bad one stops nobody else."""

import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bases import base_in_float32
from tiny_runs import load_stage

from r1pipe.chat.template import Chat
from r1pipe.config import script_options
from r1pipe.config.script_options import GenerateOptions
from r1pipe.core.paths import content_dir, stages_dir
from r1pipe.core.types import Prompt
from r1pipe.model.cache import LatentCache
from r1pipe.runs import checkpoints

BASE = content_dir() / "base"
CONTEXT = 512
SHORT = "Use 3, 5 and 7 to make 22."


def options(questions: list[str], chat: bool = False, max_tokens: int | None = None) -> GenerateOptions:
    return GenerateOptions(BASE, questions, chat, not chat, 0.0, None, max_tokens, 0)


def long_question(tokens: int) -> str:
    """A question of exactly so many tokens in the chat template."""
    text = "7" * (tokens - 3)  # a token each, beside those that begin a text and name the speakers
    assert len(Chat.load(BASE).prompt_tokens(Prompt("", "", "", text))) == tokens
    return text


def answers(out: str) -> dict[str, str]:
    return {row["question"]: row["answer"] for row in map(json.loads, out.splitlines())}


def test_a_long_question_does_not_cut_the_other_answers_short(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    stage, long, base = load_stage("generate"), long_question(CONTEXT - 2), base_in_float32(tmp_path / "base")
    assert stage.main(replace(options([SHORT]), checkpoint=base)) == 0
    alone = answers(capsys.readouterr().out)
    assert len(Chat.load(BASE).encode(alone[SHORT])) > 2
    assert stage.main(replace(options([SHORT, long]), checkpoint=base)) == 0
    together = answers(capsys.readouterr().out)
    assert together[SHORT] == alone[SHORT] and set(together) == {SHORT, long}


def test_a_question_that_is_too_long_is_named_and_the_others_are_answered(
    capsys: pytest.CaptureFixture,
) -> None:
    stage, too_long = load_stage("generate"), long_question(CONTEXT)
    assert stage.main(options([SHORT, too_long, "\udcff", "Why?"])) == 1
    out, err = capsys.readouterr()
    assert set(answers(out)) == {SHORT, "Why?"}
    first, second = err.splitlines()
    assert first.startswith(f"r1pipe: question 2 has {CONTEXT} tokens") and "shorten it" in first
    assert second.startswith("r1pipe: question 3 is not valid UTF-8")
    assert stage.main(options([too_long])) == 2


def test_a_chat_goes_on_after_a_question_that_is_too_long(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = load_stage("generate")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{long_question(CONTEXT)}\n\n{SHORT}\n"))
    assert stage.main(options([], chat=True)) == 0
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and "question 1 has" in err
    assert out.count("> ") == 4 and len(out) > 20


def test_a_system_prompt_is_read_and_told(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    stage = load_stage("generate")
    assert stage.main(options([SHORT])) == 0
    plain, silent = capsys.readouterr()
    given = replace(options([SHORT]), system="1 2 3 4 5 6 7 8 9")
    assert stage.main(given) == 0
    prompted, told = capsys.readouterr()
    assert silent == "" and told == "system prompt: 1 2 3 4 5 6 7 8 9\n"
    assert answers(prompted)[SHORT] != answers(plain)[SHORT]
    shutil.copytree(BASE, tmp_path / "prompted")
    Chat.load(BASE, given.system).save(BASE, tmp_path / "prompted")
    checkpoints.write_manifest(tmp_path / "prompted")
    of_checkpoint = replace(options([SHORT]), checkpoint=tmp_path / "prompted")
    assert stage.main(of_checkpoint) == 0
    assert capsys.readouterr() == (prompted, told)
    assert stage.main(replace(of_checkpoint, system="")) == 0
    assert capsys.readouterr() == (plain, silent)


def test_the_cache_holds_what_is_needed_not_the_whole_context(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, lengths = load_stage("generate"), []
    first = LatentCache.__init__

    def noting(cache: LatentCache, model: torch.nn.Module, slots: int, length: int) -> None:
        lengths.append(length)
        first(cache, model, slots, length)

    monkeypatch.setattr(LatentCache, "__init__", noting)
    tokens = len(Chat.load(BASE).prompt_tokens(Prompt("", "", "", SHORT)))
    stage.main(options([SHORT], max_tokens=10))
    assert lengths[0] == tokens + 10
    lengths.clear()
    stage.main(options([SHORT]))
    whole = answers(capsys.readouterr().out.splitlines()[-1])
    assert lengths[0] < CONTEXT
    monkeypatch.setattr("r1pipe.train.rollout.batching.CACHE_TOKENS", 1)  # it grows on the way
    stage.main(options([SHORT]))
    assert answers(capsys.readouterr().out) == whole


def test_the_model_goes_to_the_gpu_in_bfloat16_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = load_stage("generate")
    assert stage.load(BASE).lm_head.weight.device.type == "cpu"
    asked = []
    choice = lambda wish: asked.append(wish) or torch.device("meta")  # noqa: E731
    monkeypatch.setattr("r1pipe.train.standalone.choose_device", choice)
    weight = stage.load(BASE).lm_head.weight
    assert asked == ["auto"] and weight.device.type == "meta" and weight.dtype == torch.bfloat16


def started(folder: Path, **streams: object) -> subprocess.Popen:
    file = folder / "options.json"
    script_options.write(options([], max_tokens=8), file)
    line = [sys.executable, str(stages_dir() / "generate.py"), str(file)]
    return subprocess.Popen(
        line, stdin=subprocess.PIPE, stderr=subprocess.PIPE, stdout=subprocess.PIPE, **streams
    )


def test_bytes_that_are_not_utf_8_and_a_latin_1_terminal_are_no_traceback(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    out, err = started(tmp_path, env=env).communicate("用 3 凑出 3。\n".encode() + b"\xff\xfe\n")
    assert list(answers(out.decode())) == ["用 3 凑出 3。"]
    assert err.decode() == "r1pipe: question 2 is not valid UTF-8; convert it\n"


def test_a_reader_who_has_left_ends_it_quietly(tmp_path: Path) -> None:
    process = started(tmp_path)
    assert process.stdout and process.stderr
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(b"Why?\n")
    assert err == b"" and process.returncode == 1
