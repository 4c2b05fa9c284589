"""Experts that ranks share out, in each part of a pipeline: the same training as on one rank."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from faults.lab import Lab, Shape
from safetensors.torch import load_file
from test_pipeline_parallel import Case, alone, check, on_ranks

from r1pipe.core.paths import RunFolder

__all__ = ["alone"]  # a fixture


def test_four_ranks_share_experts_and_layers_and_resume_exactly(
    tmp_path: Path, alone: dict[str, Any]
) -> None:
    whole = Case(2, experts=2, level=1, broken=True)
    first = Case(2, experts=2, level=1, after="state", steps=1)
    resumed = Case(2, experts=2, level=1, before="state", steps=1)
    expected, _, found = on_ranks(tmp_path, 4, whole, first, resumed)
    check(expected, alone, whole)
    assert found["losses"][0] == expected["losses"][1] and found["norms"] == expected["norms"][1:]
    for name, tensor in expected["weights"].items():
        assert torch.equal(found["weights"][name], tensor), name


SIZES = {  # on four ranks
    "cold_start": ("stage.batch_size=4", "stage.demonstrations=64"),
    "grpo": ("stage.prompts_per_step=4",),
}


@pytest.mark.slow
def test_folded_schedules_share_experts(tmp_path: Path, alone: dict[str, Any]) -> None:
    cases = [Case(2, schedule, 2, level=1) for schedule in ("zbv", "dualpipev")]
    cases.append(Case(2, experts=2, level=1, recompute=True, offload=True))
    for case, found in zip(cases, on_ranks(tmp_path, 4, *cases), strict=True):
        check(found, alone, case)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["cold_start", "grpo"])
def test_stages_train_as_without_and_lose_nothing_to_a_kill(tmp_path: Path, stage: str) -> None:
    """grpo replaces its reference at each step, and saves it."""
    lab, shape = Lab(tmp_path), ("model.num_hidden_layers=4", "stage.optim.eps=1", *SIZES[stage])
    words = ("engine.pipeline=2", "engine.expert_parallel=2")
    plain, cut = Shape(stage, 4, 1, shape), Shape(stage, 4, 1, (*shape, *words))
    assert lab.killed(cut, lab.moment(cut, "after a save", seed=0)) == []
    weights, losses = [], []
    for one in (plain, cut):
        folder = RunFolder(lab.reference(one).folder)
        weights.append(load_file(max(folder.checkpoints.iterdir()) / "model.safetensors"))
        rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
        losses.append([row[key] for row in rows for key in ("train/loss", "train/grad_norm") if key in row])
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.allclose(weights[1][name], tensor, rtol=1e-4, atol=1e-6), name
    assert losses[0] and losses[1] == pytest.approx(losses[0], rel=1e-4, abs=1e-6)
