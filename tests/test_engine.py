"""The engine: the same training whatever the ranks, micro-batches and ZeRO level; exact resume."""

import json
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forked import codes, ranks
from jobs import OPTIM, ROUTER, engine_config, launched, on_two_ranks, tiny_model
from torch.nn.functional import cross_entropy

from r1pipe.core.errors import CheckpointError, ConfigError
from r1pipe.model import load_pretrained, save_pretrained
from r1pipe.train.engine.discovery import discover
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.optimizer import lr_factor
from r1pipe.train.engine.patches import exit_immediately_with
from r1pipe.train.engine.state import load_tensors

STEPS = 3


def batch() -> torch.Tensor:
    return torch.randint(0, 100, (8, 12), generator=torch.Generator().manual_seed(1))


def loss_of(model, rows) -> torch.Tensor:
    logits = model(rows[:, :-1])
    return cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())


def engine(level: int = 0, precision: str = "fp32", optim=OPTIM, model=None) -> Engine:
    made = Engine(model or tiny_model(), optim, ROUTER, engine_config(1, level, precision), total_steps=10)
    return made


def whole(made: Engine):
    return made.train_step([lambda: loss_of(made.module, batch())])


@pytest.fixture(scope="module")
def one_rank() -> list:
    made = engine()
    return [whole(made) for _ in range(STEPS)]


def test_loss_falls_and_learning_rate_follows_the_schedule(one_rank):
    losses = [stats.loss for stats in one_rank]
    assert losses[0] > losses[1] > losses[2]
    assert [stats.lr for stats in one_rank] == pytest.approx([0.005, 0.01, 0.01])


def test_shares_of_the_loss_add_up(one_rank):
    made = engine()
    first, rest = batch().split([2, 6])
    stats = [
        made.train_step(
            [lambda: loss_of(made.module, first) * 0.25, lambda: loss_of(made.module, rest) * 0.75]
        )
        for _ in range(STEPS)
    ]
    assert [s.loss for s in stats] == pytest.approx([s.loss for s in one_rank], rel=1e-5)
    assert [s.grad_norm for s in stats] == pytest.approx([s.grad_norm for s in one_rank], rel=1e-4)


@pytest.mark.parametrize("level", [1, 2, 3])
def test_zero_levels_train_alike(one_rank, level):
    made = engine(level)
    stats = [whole(made) for _ in range(STEPS)]
    assert [s.loss for s in stats] == pytest.approx([s.loss for s in one_rank], rel=1e-4)
    assert [s.grad_norm for s in stats] == pytest.approx([s.grad_norm for s in one_rank], rel=1e-3)


def test_bf16_keeps_float32_masters(one_rank):
    made = engine(1, "bf16")
    stats = [whole(made) for _ in range(STEPS)]
    assert [s.loss for s in stats] == pytest.approx([s.loss for s in one_rank], rel=0.02)
    assert made.module.lm_head.weight.dtype == torch.bfloat16
    gate = made.module.model.layers[1].mlp.gate
    assert gate.e_score_correction_bias.dtype == torch.float32
    with pytest.raises(ConfigError, match="zero_level=1"):
        engine(0, "bf16")


def test_gradients_are_clipped_and_the_norm_is_the_one_before():
    free, tight = (engine(optim=replace(OPTIM, grad_clip=clip)) for clip in (1e9, 1e-3))
    assert whole(free).grad_norm == pytest.approx(whole(tight).grad_norm)
    clipped = [p.grad for p in tight.module.parameters()]
    assert all(g is None for g in clipped)  # nothing is carried into the next step
    before = tight.module.lm_head.weight.clone()
    tight._ds.zero_grad = lambda: None
    whole(tight)
    total = torch.stack([p.grad.norm() for p in tight.module.parameters()]).norm()
    assert total.item() == pytest.approx(1e-3, rel=1e-3)
    assert not torch.equal(before, tight.module.lm_head.weight)


def test_weight_decay_is_on_matrices_only():
    made = engine(optim=replace(OPTIM, weight_decay=0.5, warmup_steps=0, schedule="constant"))
    norm, matrix = made.module.model.norm.weight, made.module.lm_head.weight
    norm_before, matrix_before = norm.clone(), matrix.clone()
    made.train_step([lambda: 0.0 * loss_of(made.module, batch())])
    assert torch.equal(norm, norm_before)
    assert torch.allclose(matrix, matrix_before * (1 - 0.01 * 0.5))


def test_router_bias_moves_once_per_step_against_the_load(one_rank):
    made = engine()
    gate = made.module.model.layers[1].mlp.gate
    loads_E = whole(made).loads_LE[0]
    assert loads_E.sum() == 8 * 11 * 2  # every token, two experts each, no matter how many micro-batches
    busiest, idlest = loads_E.argmax(), loads_E.argmin()
    assert gate.e_score_correction_bias[busiest] < 0 < gate.e_score_correction_bias[idlest]
    assert gate.e_score_correction_bias.abs().max() < 0.03


@pytest.mark.parametrize(("level", "precision"), [(0, "fp32"), (2, "bf16"), (3, "fp32")])
def test_resume_is_exact(tmp_path, level, precision):
    made = engine(level, precision)
    whole(made)
    made.save(tmp_path / "engine", {"step": 1, "cursor": [3, 4]})
    expected = [whole(made).loss for _ in range(2)]
    again = engine(level, precision)
    assert again.load(tmp_path / "engine") == {"step": 1, "cursor": [3, 4]}
    assert [whole(again).loss for _ in range(2)] == expected


@pytest.mark.parametrize(("before", "after"), [(0, 3), (3, 1), (2, 0)])
def test_resume_goes_on_at_another_zero_level(tmp_path, before, after):
    """Weights, both moments, decay, schedule and the experts' biases: all but rounding is the same."""
    optim = replace(OPTIM, weight_decay=0.5)
    made = engine(before, optim=optim)
    whole(made)
    made.save(tmp_path / "engine", {"step": 1})
    expected = [whole(made) for _ in range(3)]
    again = engine(after, optim=optim)
    assert again.load(tmp_path / "engine") == {"step": 1}
    found = [whole(again) for _ in range(3)]
    assert [s.loss for s in found] == pytest.approx([s.loss for s in expected], rel=1e-5)
    assert [s.grad_norm for s in found] == pytest.approx([s.grad_norm for s in expected], rel=1e-4)
    assert [s.lr for s in found] == [s.lr for s in expected]
    with made.gathered() as one, again.gathered() as other:
        assert torch.allclose(one.model.norm.weight, other.model.norm.weight, atol=1e-6)
        bias, its = (m.model.layers[1].mlp.gate.e_score_correction_bias for m in (one, other))
        assert torch.equal(bias, its) and bias.any()
    assert not list(tmp_path.glob(".*"))  # what was converted is gone


def test_resume_goes_on_with_another_number_of_ranks(tmp_path):
    """One rank to two, and back to one, at every ZeRO level: five steps in all, as one rank takes them."""
    made = engine()
    expected = [whole(made).loss for _ in range(5)]
    for level in range(4):
        go_on(tmp_path, level, 2)
    found = {level: go_on(tmp_path, int(level), 1) for level in on_two_ranks("two_ranks_resume.py", tmp_path)}
    for level, losses in found.items():
        assert losses == pytest.approx(expected, rel=1e-4), level


def go_on(folder: Path, level: int, steps: int) -> list[float]:
    """Go on from what the folder holds, if anything, for so many steps on the ranks of this job; the losses
    from the beginning."""
    ranks = discover().world_size
    made = Engine(tiny_model(), OPTIM, ROUTER, engine_config(ranks, level), total_steps=10)
    newest = max(folder.glob(f"level-{level}-*"), default=None)
    losses = made.load(newest) if newest else []
    rows = batch()[made.rank :: ranks]
    losses += [made.train_step([lambda: loss_of(made.module, rows)]).loss for _ in range(steps)]
    made.save(folder / f"level-{level}-{len(losses)}", losses)
    return losses


def train_one_step(folder: Path) -> None:
    save_pretrained(tiny_model(), folder / "weights")
    model = load_pretrained(folder / "weights")
    made = Engine(model, OPTIM, ROUTER, engine_config(1, 1), total_steps=1)
    made.train_step([lambda: loss_of(made.module, batch())])
    made.save(folder / "saved", {})
    (folder / "modules.json").write_text(json.dumps([*sys.modules]))
    exit_immediately_with(0)


def test_a_job_imports_no_compiler(tmp_path):
    """DeepSpeed would, for an optimizer that no job uses; torch would, for its own optimizers and for weights
    on the meta device."""
    with ranks(tmp_path, train_one_step, 1) as started:
        assert codes(started) == [0], (tmp_path / "out-0.txt").read_text()[-3000:]
    modules = json.loads((tmp_path / "modules.json").read_text())
    assert "deepspeed.runtime.zero.muon.muon_optimizer" in modules
    assert {"torch._dynamo", "torch._inductor.compile_fx", "sympy"}.isdisjoint(modules)


def test_saved_state_cannot_carry_code(tmp_path):
    path = tmp_path / "state.pt"
    for spoil, why in (
        (lambda: torch.save({"evil": Path("/")}, path), "it contains pathlib"),
        (lambda: path.write_bytes(pickle.dumps(Path("/"), 2)), "it contains pathlib"),
        (lambda: path.write_bytes(b"junk"), "damaged or missing"),
        (path.unlink, "damaged or missing"),
    ):
        spoil()
        with pytest.raises(CheckpointError, match=why) as caught:
            load_tensors(str(path))
        assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
        assert str(path) in str(caught.value) and "remove this checkpoint" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"ranks": 1, "zero_level": 0', "is not valid JSON"),
        ('{"ranks": "1", "zero_level": 0}', "does not name the ranks"),
        ('{"ranks": 1, "zero_level": 4}', "does not name the ranks"),
        ('{"ranks": 2, "zero_level": 1}', "has other files"),
        (None, "is missing"),
    ],
)
def test_a_damaged_layout_is_refused_in_one_line(tmp_path, content, told):
    made = engine()
    made.save(tmp_path / "engine", {"step": 1})
    layout = tmp_path / "engine" / "layout.json"
    layout.unlink() if content is None else layout.write_text(content)
    with pytest.raises(CheckpointError, match=told) as caught:
        made.load(tmp_path / "engine")
    assert "\n" not in str(caught.value) and str(layout) in str(caught.value)


@pytest.mark.parametrize(
    ("schedule", "middle", "last"), [("constant", 1.0, 1.0), ("linear", 0.55, 0.1), ("cosine", 0.55, 0.1)]
)
def test_schedules(schedule, middle, last):
    factor = lr_factor(replace(OPTIM, schedule=schedule), total_steps=13)
    values = [factor(0), factor(1), factor(2), factor(7), factor(12), factor(20)]
    assert values == pytest.approx([0.5, 1.0, 1.0, middle, last, last])


def test_two_ranks_train_as_one(tmp_path, one_rank):
    all_found = launched("two_ranks.py", tmp_path)
    for level, found in all_found.items():
        assert found["losses"] == pytest.approx([s.loss for s in one_rank], rel=1e-4), level
        assert found["norms"] == pytest.approx([s.grad_norm for s in one_rank], rel=1e-3), level
        assert found["weights"][0] == found["weights"][1], level
        assert found["sums"] == [2.0, 1.0]
        assert found["skipped"] == [[True, 1, True]] * 2, level
        assert found["after_prompts"] == pytest.approx(all_found["0"]["after_prompts"], rel=1e-3), level
        assert found["loads"][0] == one_rank[0].loads_LE.tolist(), (
            level
        )  # repeats for the other rank not counted
