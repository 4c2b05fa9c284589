"""`make test-vllm`: vLLM on the CPU, in an environment of its own, loads our export and computes the same."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from r1pipe.chat.template import Chat
from r1pipe.cli import commands as cli
from r1pipe.core.types import Prompt
from r1pipe.model import load_pretrained
from r1pipe.train.rollout import SamplingParams
from r1pipe.train.rollout.batching import Batcher

pytestmark = pytest.mark.vllm
QUESTIONS = [
    "Use 9, 25, 3 and 14 to make 17.",
    "Tom has 3 apples and buys 4 more. How many apples does he have?",
    "Who are you?",
    "用 3、5 和 7 凑出 22。",
]


def test_vllm_draws_the_same_greedy_tokens_with_the_same_logprobs(tmp_path, monkeypatch):
    python = os.environ.get("R1PIPE_VLLM_PYTHON")
    assert python, "`make test-vllm` says where vLLM's python is"
    folder = tmp_path / "export"
    monkeypatch.setattr("sys.argv", ["r1pipe", "export", "bundled", str(folder), "tracking=none"])
    with pytest.raises(SystemExit, match="0"):
        cli.main()
    chat = Chat.load(folder)
    asked = [chat.prompt_tokens(Prompt("", "", "", question)) for question in QUESTIONS]
    (tmp_path / "prompts.json").write_text(json.dumps(asked))
    script = Path(__file__).with_name("vllm_greedy.py")
    words = [python, script, folder, tmp_path / "prompts.json", tmp_path / "answers.json"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = json.loads((tmp_path / "answers.json").read_text())
    params = SamplingParams(max_tokens=24, temperature=0.0)
    mine = Batcher(load_pretrained(folder).eval()).generate(asked, params)
    apart = 0.0
    for ours, other in zip(mine, theirs, strict=True):
        assert (ours.tokens, ours.finish_reason) == (other["tokens"], other["reason"])
        gap = torch.tensor(ours.logprobs) - torch.tensor(other["logprobs"])
        apart = max(apart, gap.abs().max().item())
    assert apart < 1e-2
    count = sum(len(row["tokens"]) for row in theirs)
    print(f"\n{count} greedy tokens alike, logprobs {apart:.1e} apart at most")
