"""What puts a teacher into a student: divergence, ranking and reinforcement, on tiny runs of the bundled world.

What the losses are is in tests/test_distill_losses.py; what is got out of a teacher, in tests/test_extract.py.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults.same import both
from rl_runs import metrics_of
from safetensors.torch import load_file
from tiny_runs import load_stage, tiny_config, tiny_run
from torch import Tensor

from r1pipe.chat.template import Chat
from r1pipe.config import ParentRef
from r1pipe.core.errors import CheckpointError, ConfigError, DataError
from r1pipe.core.paths import RunFolder
from r1pipe.core.types import Completion, Example, PreferencePair, Prompt
from r1pipe.data.packing import Packed, pack
from r1pipe.runs import checkpoints, lineage, samples
from r1pipe.train.distill import divergence, on_policy, ranking, transfer
from r1pipe.train.distill.divergence import OwnRow, StoredExample, StoredRow, prompts_of, stored_of
from r1pipe.train.distill.on_policy import TokenTeacher, with_prompts
from r1pipe.train.distill.ranking import Pair, in_parts
from r1pipe.train.extract.alignment import TopK
from r1pipe.train.rl.batch import Rollout

STUDENT = "model.hidden_size=16"
ASKED = ["stage.prompts=6", "stage.samples_per_prompt=2", "stage.sampling.max_tokens=80"]
ALL = ["stage.filters.correct_only=false", "stage.filters.well_formed=false"]
SMALL = ["stage=distill", STUDENT, "stage.max_steps=3", "stage.batch_size=2", "stage.epochs=9", *ASKED, *ALL]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> ParentRef:
    folder = tmp_path_factory.mktemp("student") / "pretrain-s0-1"
    tiny_run(folder, "stage=pretrain", STUDENT, "stage.max_steps=1")
    load_stage("pretrain").main(str(folder))
    return lineage.checkpoint_of_run(RunFolder(folder))


def go(folder: Path, *words: str, student: ParentRef) -> RunFolder:
    """A distillation from the bundled base, in this process."""
    if not folder.exists():
        tiny_run(folder, *SMALL, *words, weights=student, taught_by=lineage.bundled())
    load_stage("distill").main(str(folder))
    return RunFolder(folder)


def told(folder: Path, *words: str, student: ParentRef) -> str:
    """The one line that a refused run ends with."""
    with pytest.raises(SystemExit) as ended:
        go(folder, *words, student=student)
    text = (folder / "error.txt").read_text()
    assert ended.value.code == 2 and text.count("\n") == 1
    return text


def logged(run: RunFolder, name: str) -> list[float]:
    return [row[name] for row in metrics_of(run.path)]


# --- every way in, from the command's config to the record

WAYS = {
    "live": ["stage.transfer=divergence"],
    "stored": ["stage.extract=distribution", "stage.transfer=divergence", "stage.distribution.top_k=8"],
    "dpo": ["stage.transfer=ranking"],
    "simpo": [
        *("stage.transfer=ranking", "stage.ranking.loss=simpo", "stage.ranking.beta=2.0"),
        *("stage.ranking.target_margin=0.5", "stage.ranking.sft_weight=0.1"),
    ],
    "scored pairs": ["stage.extract=feedback", "stage.transfer=ranking"],
    "on-policy": ["stage.extract=distribution", "stage.transfer=rl"],
    "scores": ["stage.extract=feedback", "stage.transfer=rl"],
}
LOGGED = {
    "live": {"distill/kl", "distill/teacher_tokens", "distill/on_policy_tokens"},
    "stored": {"distill/kl", "distill/teacher_tokens"},
    "dpo": {"ranking/margin", "ranking/accuracy", "distill/teacher_tokens"},
    "simpo": {"ranking/margin", "ranking/accuracy", "ranking/chosen_logp", "ranking/rejected_logp"},
    "scored pairs": {"ranking/margin", "ranking/accuracy"},
    "on-policy": {"distill/reverse_kl", "distill/teacher_tokens"},
    "scores": {"rewards/teacher/mean", "reward"},
}


def killed_and_resumed(folder: Path, *words: str, student: ParentRef, patch: pytest.MonkeyPatch) -> RunFolder:
    """A run that is killed as it finishes its second checkpoint, and again to its end."""
    finish = checkpoints.finish

    def killed(target: Path, *rest: Any) -> None:
        if target.name == "step-2":
            raise KeyboardInterrupt
        finish(target, *rest)

    with patch.context() as here, pytest.raises(KeyboardInterrupt):
        here.setattr(checkpoints, "finish", killed)
        go(folder, *words, student=student)
    assert not (folder / "record.json").exists()
    return go(folder, student=student)


@pytest.mark.parametrize("name", WAYS)
def test_a_way_in_trains_and_resumes_exactly(
    name: str, student: ParentRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*WAYS[name], "stage.save_every=1", "stage.optim.lr=0.01", "stage.optim.min_lr=0.01"]
    whole = go(tmp_path / "whole", *words, student=student)
    record = json.loads(whole.record.read_text())
    assert record["steps"] == 3 and record["data_hash"] == checkpoints.file_hash(whole.dataset)
    rows = metrics_of(whole.path)
    assert len(rows) == 3 and all(LOGGED[name] <= row.keys() for row in rows)
    before = load_file(Path(student.checkpoint) / "model.safetensors")
    after = load_file(whole.checkpoint(3) / "model.safetensors")
    assert any(not torch.equal(before[key], after[key]) for key in before), "something was learned"
    again = killed_and_resumed(tmp_path / "again", *words, student=student, patch=monkeypatch)
    assert metrics_of(again.path) == rows
    found = load_file(again.checkpoint(3) / "model.safetensors")
    assert all(torch.equal(found[key], after[key]) for key in after), "to the last bit"
