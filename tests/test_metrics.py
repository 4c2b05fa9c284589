"""Metrics under the names that docs/metrics.md lists: what runs log, what TRL calls it, and the numbers."""

import importlib.util
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rl_runs import go, metrics_of, objective
from tiny_runs import tiny_run

from r1pipe.core.types import Score
from r1pipe.train.rl import scoring
from r1pipe.train.rl.losses import PolicyLoss, policy_loss
from r1pipe.train.rl.rows import speeds
from r1pipe.train.rl.update import _extremes, _Step

HOME = Path(__file__).resolve().parent.parent
TABLE = re.findall(
    r"^\| `([^`]+)` \| (.+?) \| (.*?) ?\|$", (HOME / "docs" / "metrics.md").read_text(), re.MULTILINE
)
ROUTES = ("stage.routing_check_samples=1",)
OF_A_BROKEN_STEP = {"train/skipped"}  # test_finite.py makes one
OF_GENERAL_PROMPTS = {  # test_generative_judges.py draws some
    *("truth/helpful", "truth/harmless", "truth/correct"),
    *("truth/judge/gap", "truth/judge/correlation"),
}
OF_DISTILLATION = {  # test_transfer.py trains every way
    *("distill/kl", "distill/teacher_tokens", "distill/on_policy_tokens", "distill/reverse_kl"),
    *("ranking/margin", "ranking/accuracy", "ranking/chosen_logp", "ranking/rejected_logp"),
    "train/mtp_loss",
}
OF_THE_LINE = {"step", "time"}  # where and when, not measured
SHORT = (
    "stage.max_steps=2",
    "stage.save_every=0",
    "stage.sampling.max_tokens=8",
    "model.qk_rope_head_dim=16",
)


def pattern(name: str) -> re.Pattern:
    """`rewards/NAME/mean` as an expression: words in capitals stand for any one."""
    return re.compile(re.sub(r"\b[A-Z]+\b", r"[^/]+", name))


def unlisted(names: Iterable[str]) -> list[str]:
    """The names that the table does not have."""
    patterns = [pattern(name) for name, _, _ in TABLE]
    return [name for name in sorted({*names} - OF_THE_LINE) if not any(p.fullmatch(name) for p in patterns)]


@pytest.fixture(scope="module")
def logged(tmp_path_factory) -> set[str]:
    """All names that small runs of every kind log."""
    folder = tmp_path_factory.mktemp("runs")
    kinds = {
        "grpo": (
            "stage.eval.every=1",
            "stage.kl_coef=0.1",
            "stage.importance_cap=2.0",
            "precision=fp8",
            *ROUTES,
        ),
        "masked": ("stage.importance=sequence_mask", "engine.async_steps=1"),
        "dynamic": ("stage.max_sampling_batches=2", "tripwires.wires.truncation.limit=0.0"),
        "ppo": ("stage.algorithm=ppo", "stage.router.balance_alpha=0.01"),
    }
    names: set[str] = set()
    with pytest.MonkeyPatch.context() as patch:
        judge = scoring.score_all

        def with_strange_verdicts(*asked):
            return [row | {"accuracy": Score(i % 2)} for i, row in enumerate(judge(*asked))]

        patch.setattr(scoring, "score_all", with_strange_verdicts)
        for kind, overrides in kinds.items():
            go(run := tiny_run(folder / kind, "stage=grpo", *SHORT, *overrides))
            for line in (run / "metrics.jsonl").read_text().splitlines():
                assert all(math.isfinite(value) for value in json.loads(line).values())
                names |= json.loads(line).keys()
    return names - OF_THE_LINE


def test_the_table_lists_what_runs_log_and_nothing_else(logged):
    patterns = {name: pattern(name) for name, _, _ in TABLE}
    assert len(patterns) == len(TABLE) > 50
    assert not unlisted(logged)
    shown = logged | OF_A_BROKEN_STEP | OF_GENERAL_PROMPTS | OF_DISTILLATION
    assert not [name for name, p in patterns.items() if not any(map(p.fullmatch, shown))]


def test_names_that_are_said_to_be_trls_are():
    spec = importlib.util.find_spec("trl")
    assert spec and spec.submodule_search_locations
    source = (Path(spec.submodule_search_locations[0]) / "trainer" / "grpo_trainer.py").read_text()
    of_trl = {
        re.sub(r"\{\w+\}", "NAME", name) for name in re.findall(r'_metrics\[mode\]\[\s*f?"([^"]+)"', source)
    }
    said = {name for name, _, trl in TABLE if trl.startswith("yes")}
    assert said <= of_trl
    others = {name for name, _, trl in TABLE if not trl}
    assert not others & of_trl, "TRL has a name for it"


def test_ratios_and_gaps_by_hand():
    """Three trained tokens, and one whose reward failed, which counts nowhere."""
    old_N = torch.tensor([0.5, 0.25, 0.4, 0.001]).log()
    now_N = torch.tensor([0.5, 0.50, 0.1, 0.9]).log()
    found = policy_loss(
        now_N, old_N, torch.ones(4), torch.tensor([0.3, 0.3, 0.4, 0.0]), torch.tensor([2, 2]), objective()
    )
    assert found.sums["ratio"].item() == found.sums["sampling_ratio"].item() == pytest.approx(1 + 2 + 0.25)
    assert (
        found.extremes["importance_ratio/min"].item(),
        found.extremes["importance_ratio/max"].item(),
    ) == pytest.approx((0.25, 2.0))
    assert found.extremes["sampling/sampling_logp_difference/max"].item() == pytest.approx(math.log(4))
    assert found.sums["gap"].item() == pytest.approx(math.log(2) + math.log(4))
    # with the trainer's own log-probabilities the clip's ratio is to these, the sampler's ratio still to its
    trainer_N = torch.tensor([0.5, 0.5, 0.2, 0.9]).log()
    capped = policy_loss(
        *(now_N, old_N, torch.ones(4), torch.ones(4), torch.tensor([4])),
        objective(importance="token_truncate", importance_cap=2.0),
        trainer_N=trainer_N,
    )
    assert (
        capped.extremes["importance_ratio/min"].item(),
        capped.extremes["importance_ratio/max"].item(),
    ) == pytest.approx((0.5, 1.0))
    assert capped.extremes["sampling/importance_sampling_ratio/max"].item() == pytest.approx(900, rel=1e-3)


def step_with(losses: list[PolicyLoss]) -> _Step:
    extremes = {name: [loss.extremes[name].item() for loss in losses] for name in losses[0].extremes}
    return _Step(SimpleNamespace(broken=None), {}, extremes, None)


def test_extremes_are_those_of_all_ranks_and_a_rank_without_trained_tokens_adds_none():
    half, none = (
        policy_loss(
            torch.tensor([0.2]).log(),
            torch.tensor([0.4]).log(),
            torch.ones(1),
            weights_N,
            torch.tensor([1]),
            objective(),
        )
        for weights_N in (torch.ones(1), torch.zeros(1))
    )
    other = {
        "importance_ratio/min": 0.7,
        "importance_ratio/max": 3.0,
        "sampling/importance_sampling_ratio/min": 0.1,
        "sampling/importance_sampling_ratio/max": 0.1,
        "sampling/sampling_logp_difference/max": 0.2,
    }
    engine = SimpleNamespace(all_gather_objects=lambda mine: [mine, other])
    step = step_with([half, none])
    found = _extremes(engine, [step], step)
    assert found == pytest.approx(
        {
            "importance_ratio/min": 0.5,
            "importance_ratio/max": 3.0,
            "sampling/importance_sampling_ratio/min": 0.1,
            "sampling/importance_sampling_ratio/max": 0.5,
            "sampling/sampling_logp_difference/max": math.log(2),
        }
    )
    step = step_with([none])
    assert _extremes(engine, [step], step)["importance_ratio/min"] == 0.7


def test_speeds_count_sampled_tokens():
    found = speeds([{"length": 30}, {"length": 70}], {"time/sampling_s": 2.0}, 5.0)
    assert found == {"time/step_s": 5.0, "tokens_per_s": 20.0, "sampling/tokens_per_s": 50.0}


def test_a_run_that_was_begun_under_other_names_goes_on(tmp_path):
    """Tripwires read the lines of before a resume."""
    folder = tiny_run(tmp_path / "run", "stage=grpo", *SHORT, "stage.save_every=1", "stage.max_steps=1")
    go(folder)
    (folder / "record.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["stage"]["max_steps"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    old = {"step": 1, "time": 1.0, "reward/mean": 0.5, "rollout/length_mean": 8.0, "eval/pass_at_1": 0.1}
    (folder / "metrics.jsonl").write_text(json.dumps(old) + "\n")
    go(folder)
    assert [row["step"] for row in metrics_of(folder)] == [1, 2]
