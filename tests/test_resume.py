"""Exact resume: N steps in one go, and k steps, kill -9 and the same command again, end with the same bits.

Here each stage, number of ranks, ZeRO level and kind of moment occurs at least once; `make faults` has the
whole product (tests/faults/matrix.py). Jobs are forked, not launched, and the kill is a SIGKILL.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from faults.lab import BESIDE, POINTS, Lab, Shape
from faults.points import AFTER_A_SAVE, BEFORE_A_SAVE, DURING_A_SAVE, JUDGING, JUDGING_BY_MODELS, SAMPLING
from faults.same import apart, both
from safetensors.torch import load_file, save_file

from r1pipe.config import STAGE_TYPES, EvaluateConfig

CASES = [
    ("pretrain", 1, 0, "weights written, state not"),
    ("cold_start", 2, 1, "after a save"),
    ("grpo", 2, 3, "in sampling"),
    ("grpo", 1, 2, "between update and log"),
    ("rejection_sft", 2, 0, "shard drawn, not written"),
    ("rejection_sft", 1, 1, "in sampling"),
    ("reward_model", 2, 3, "state written, manifest not"),
    ("all_scenario", 2, 2, "in judging by models"),
    ("zero", 1, 1, "in judging by rules"),
    ("control_sft", 1, 2, "before a save"),
    ("control_sft", 1, 2, "saved, old ones there"),
    ("distill", 2, 3, "in an update"),
    ("expert_iteration", 1, 0, "shard drawn, not written"),
    ("pretrain", 2, 3, "copied, not written"),
    ("pretrain", 2, 1, "hashed by a rank"),
]
# `make test` has every ZeRO level, and each kind of loop once: a corpus (with a save beside training), RL,
# rejection sampling and reward models; `make test-all` has every stage.
SLOW = (*CASES[:3], *CASES[5:6], *CASES[7:14])


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(
            case, marks=[pytest.mark.slow] * (case in SLOW), id="-".join(map(str, case)).replace(" ", "_")
        )
        for case in CASES
    ],
)
def test_a_kill_loses_nothing(lab: Lab, case: tuple[str, int, int, str]) -> None:
    stage, ranks, zero_level, point = case
    beside = point in ("copied, not written", "hashed by a rank")
    shape = Shape(stage, ranks, zero_level, BESIDE * beside)
    assert lab.killed(shape, lab.moment(shape, point, seed=0)) == []


def test_every_value_of_every_axis_is_among_the_cases() -> None:
    trained = {name for name, kind in STAGE_TYPES.items() if kind is not EvaluateConfig}
    assert trained == set(POINTS), "the matrix has every stage that trains"
    stages, ranks, levels, points = map(set, zip(*CASES, strict=True))
    assert (stages, ranks, levels) == (trained, {1, 2}, {0, 1, 2, 3})
    kinds = (BEFORE_A_SAVE, DURING_A_SAVE, AFTER_A_SAVE, SAMPLING, JUDGING, JUDGING_BY_MODELS)
    assert all(points & kind.keys() for kind in kinds)


def test_what_is_compared_would_show_a_loss(lab: Lab, tmp_path: Path) -> None:
    """Every part of a run in turn is made another one, by as little as there is."""
    whole = lab.reference(Shape("grpo", 1, 2)).folder
    spoilt = lab.prepared(tmp_path / "spoilt", Shape("grpo", 1, 2))
    for change, told in (
        (another_bias, "e_score_correction_bias: other numbers"),
        (another_moment, "exp_avg"),
        (another_reference, "reference/model.safetensors"),
        (a_repeated_step, "a gap or a repeat"),
        (another_metric, "train/loss"),
        (a_changed_rollout, "rollouts: step-3.parquet"),
        (a_missing_rollout, "rollouts: files"),
        (another_sample, "samples.json"),
    ):
        for path in whole.rglob("*"):
            copy = spoilt / path.relative_to(whole)
            if path.is_file():
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(path.read_bytes())
        assert both(whole, spoilt) == []
        change(spoilt)
        assert any(told in line for line in both(whole, spoilt)), (change, both(whole, spoilt))


def newest(run: Path) -> Path:
    return run / "checkpoints" / "step-4"


def listed_anew(checkpoint: Path) -> None:
    from r1pipe.runs import checkpoints

    checkpoints.write_manifest(checkpoint)


def another_bias(run: Path) -> None:
    path = newest(run) / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("e_score_correction_bias"))
    tensors[name][0] = torch.nextafter(tensors[name][0], torch.tensor(9.0))
    save_file(tensors, path, {"format": "pt"})
    listed_anew(newest(run))


def another_moment(run: Path) -> None:
    path = next((newest(run) / "engine").rglob("*optim_states.pt"))
    state = torch.load(path, weights_only=False)
    moments = next(one for one in tensors_of(state) if "exp_avg" in one[0])
    moments[1].view(-1)[-1] += 1
    torch.save(state, path)
    listed_anew(newest(run))


def tensors_of(value: object, name: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    for key, part in (
        value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else [])
    ):
        yield from tensors_of(part, f"{name}/{key}")


def another_reference(run: Path) -> None:
    path = newest(run) / "engine" / "reference" / "model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, path, {"format": "pt"})
    listed_anew(newest(run))


def a_repeated_step(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join([*lines, lines[-1]]))


def another_metric(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[1]["train/loss"] += 1e-12
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def a_changed_rollout(run: Path) -> None:
    path = run / "rollouts" / "step-3.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)


def a_missing_rollout(run: Path) -> None:
    (run / "rollouts" / "step-2.parquet").unlink()


def another_sample(run: Path) -> None:
    rows = json.loads((run / "samples.json").read_text())
    rows[0]["completion"] += " "
    (run / "samples.json").write_text(json.dumps(rows))


def test_values_are_apart_by_a_bit_and_clocks_are_not() -> None:
    nan, zero = torch.tensor([float("nan")]), torch.tensor([0.0])
    assert not [*apart({"a": nan, "time": 1}, {"a": nan.clone(), "time": 2}, "")]
    assert [*apart(zero, -zero, "z")] == ["z: other numbers"]
    assert [*apart([1, 2], [1], "l")] and [*apart({"a": 1}, {}, "d")] and [*apart(1, 1.0, "t")]
    assert not [*apart({"checkpoint": "/a", "hash": "x"}, {"checkpoint": "/b", "hash": "x"}, "")]
    assert [*apart({"checkpoint": "step-1"}, {"checkpoint": "step-2"}, "")]
