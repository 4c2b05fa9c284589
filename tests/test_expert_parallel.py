"""Expert parallelism: the same training wherever the experts are; states go from one layout to another."""

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import trained_alike, trained_on_ranks
from jobs import OPTIM, ROUTER, engine_config
from shapes import ours, tiny
from test_fp8 import WHOLE
from tiny_runs import tiny_config

from r1pipe.config import EngineConfig
from r1pipe.core.errors import ConfigError
from r1pipe.model import Balance, DeepseekV3, Policy, save_pretrained
from r1pipe.model.moe import MoE, gates
from r1pipe.model.policy import named_weights, own_tensors
from r1pipe.train.engine.discovery import discover
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.expert_parallel import ParallelExperts, ParallelMoE, share_out
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.engine.sharded import load_sharded

SHAPE = tiny(num_hidden_layers=2, num_nextn_predict_layers=1)
# With a large epsilon AdamW's steps are nearly the gradients: weights that agree had gradients that did.
OPTIMIZER = replace(OPTIM, lr=0.3, warmup_steps=0, eps=1.0, weight_decay=0.1)
STEPS, ROWS, WIDTH, PADDED = 3, 8, 24, 5
CLOSE = 1e-5


@dataclass(frozen=True)
class Case:
    """One way to train; `found` names its results."""

    level: int = 1
    experts: int = 1
    precision: str = "fp32"
    recompute: bool = False
    offload: bool = False
    replay: bool = False
    skewed: bool = False  # all tokens go to the first experts
    in_shares: bool = False  # read from the folder, each rank its own experts
    broken: bool = False  # one more step, in which the loss of the last rank is not finite
    before: str | None = None  # the state to go on from
    after: str | None = None  # the state to leave behind
    steps: int = STEPS

    def engine(self, count: int) -> EngineConfig:
        config = engine_config(count, self.level, self.precision)
        again = {"recompute": self.recompute, "offload": self.offload}
        return replace(config, expert_parallel=self.experts, **again, kernels="reference")

    def loaded(self, folder: Path, ranks: Ranks) -> Policy:
        """The model that `model` left in the folder."""

        def prepare(model: Policy) -> None:
            model.freeze_mtp()
            share_out(model, self.engine(ranks.world_size), ranks)

        return load_sharded(folder / "weights", self.engine(ranks.world_size), prepare=prepare).train()

    def model(self) -> DeepseekV3:
        model = ours(WHOLE if self.precision == "fp8" else SHAPE).train()
        model.freeze_mtp()
        if self.skewed:
            for gate in gates(model):
                gate.e_score_correction_bias[: SHAPE.num_experts_per_tok] += 10.0
        return model


def rows() -> torch.Tensor:
    return torch.randint(0, 97, (ROWS, WIDTH), generator=torch.Generator().manual_seed(1))


def replayed(case: Case, mine: slice) -> torch.Tensor | None:
    """Experts for a part of the rows, [L, N, K]."""
    if not case.replay:
        return None
    scores = torch.rand(ROWS, WIDTH, SHAPE.n_routed_experts, generator=torch.Generator().manual_seed(2))
    return scores.topk(SHAPE.num_experts_per_tok).indices[mine].flatten(0, 1).unsqueeze(0)


def share_of_loss(model: DeepseekV3, case: Case, mine: slice, weight: float) -> torch.Tensor:
    """Cross-entropy and balance loss of a part of the rows, which end in padding."""
    tokens_BT = rows()[mine]
    segments_BT = (torch.arange(WIDTH) < WIDTH - PADDED).long().expand_as(tokens_BT)
    balance = Balance(segments_BT, True, replayed(case, mine))
    hidden_BTD = model.hidden(tokens_BT, segments_BT, balance)[:, : -PADDED - 1]
    losses_N = -model.lm_head(hidden_BTD.flatten(0, 1), tokens_BT[:, 1:-PADDED].flatten())
    return weight * (losses_N.mean() + 0.1 * balance.total() / segments_BT.sum())


def parts(rank: int, count: int) -> list[tuple[slice, float]]:
    """A rank's micro-batches and their weights: odd ranks have one, the others two."""
    size = ROWS // count
    begin, half = rank * size, max(1, size // 2)
    if rank % 2 or size == 1:
        return [(slice(begin, begin + size), 1.0)]
    weight = half / size
    return [(slice(begin, begin + half), weight), (slice(begin + half, begin + size), 1 - weight)]


def train(folder: Path, case: Case) -> dict[str, Any]:
    """What a case gives on the ranks of this job: steps, evaluation and weights."""
    count = discover().world_size
    config = case.engine(count)
    model = case.loaded(folder, Ranks(config)) if case.in_shares else case.model()
    engine = Engine(model, OPTIMIZER, ROUTER, config, total_steps=10)
    if case.before is not None:
        assert engine.load(folder / case.before) == {"here": case.before}
    passes = [
        partial(share_of_loss, engine.module, case, mine, weight)
        for mine, weight in parts(engine.rank, count)
    ]
    stats = [engine.train_step(passes) for _ in range(case.steps)]
    evaluated = engine.sum_over_ranks([float(sum(engine.evaluate(passes))) / count])
    if case.after is not None:
        engine.save(folder / case.after, {"here": case.after})
    if case.broken:
        engine.max_skipped = 1
        factor = math.nan if engine.rank == count - 1 else 1.0
        assert engine.train_step([lambda: factor * passes[0]()]).broken  # and below, no weight has moved
    with engine.gathered() as model:
        weights = {name: tensor.detach().clone() for name, tensor in named_weights(model).items()}
    sent = sent_to_a_sampler(engine)
    assert sent.keys() == weights.keys() and all(torch.equal(sent[name], weights[name]) for name in sent)
    return {
        "losses": [s.loss for s in stats] + evaluated,
        "norms": [s.grad_norm for s in stats],
        "loads": [s.loads_LE.tolist() for s in stats if s.loads_LE is not None],
        "fp8": [s.fp8 for s in stats],
        "weights": weights,
        "local": [
            getattr(weight, "ds_shape", weight.shape)[0]  # ZeRO-3 empties it
            for name, weight in engine.module.named_parameters()
            if name.endswith(".w1")
        ],
    }


def sent_to_a_sampler(engine: Engine) -> dict[str, torch.Tensor]:
    """All weights, of which a rank has one tensor more than its share at a time."""

    def held() -> int:
        return sum(tensor.nbytes for _, tensor in own_tensors(engine.module))

    before, most, sent = held(), 0, dict[str, torch.Tensor]()
    for bucket in engine.buckets(1):
        sent |= {name: tensor.clone() for name, tensor in bucket.items()}
        most = max(most, held())
    largest = max(engine._elements(p) * p.element_size() for p in engine.module.parameters())
    assert most <= before + largest and held() == before
    return sent


def on_ranks(folder: Path, count: int, *cases: Case) -> list[dict[str, Any]]:
    return trained_on_ranks(folder, count, train, cases)


check = partial(trained_alike, tolerance=CLOSE)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One rank with all experts."""
    return train(tmp_path_factory.mktemp("alone"), Case())


def test_two_ranks_that_share_experts_train_as_one(tmp_path: Path, alone: dict[str, Any]) -> None:
    case = Case(experts=2, after="state", broken=True)
    [found] = on_ranks(tmp_path, 2, case)
    check(found, alone, case)
    assert found["local"] == [SHAPE.n_routed_experts // 2], "the frozen layer keeps its experts"
    expected = train(tmp_path, replace(Case(), steps=STEPS + 1))
    again = train(tmp_path, Case(before="state", steps=1))
    assert again["losses"] == pytest.approx(expected["losses"][-2:], rel=CLOSE)
    assert again["norms"] == pytest.approx(expected["norms"][-1:], rel=CLOSE)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["engine.ranks=3"], "engine.expert_parallel=2 must divide engine.ranks=3"),
        (["model.n_routed_experts=9", "model.n_group=1", "model.topk_group=1"], "model.n_routed_experts=9"),
        (["engine.zero_level=0"], "engine.expert_parallel=2 needs engine.zero_level=1 or more"),
        (["model.num_hidden_layers=1"], "model=laptop has no experts; drop it"),
        (["engine.equal=true"], "engine.equal=true needs engine.expert_parallel=1"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_in_one_line(overrides: list[str], told: str) -> None:
    given = ["stage=grpo", "engine.ranks=2", "engine.zero_level=1", "engine.expert_parallel=2"]
    with pytest.raises(ConfigError, match=told) as refused:
        tiny_config(*given, *overrides)
    assert "\n" not in str(refused.value)


def test_ranks_of_several_machines_are_counted_by_the_job() -> None:
    with pytest.raises(ConfigError, match="must divide the job's 1 ranks"):
        Engine(Case().model(), OPTIMIZER, ROUTER, Case(experts=2).engine(1), total_steps=1)


@pytest.mark.slow
def test_zero_levels_recomputation_replay_and_idle_experts(tmp_path: Path, alone: dict[str, Any]) -> None:
    halves = {"recompute": True, "offload": True}
    special = [{"recompute": True}, halves, {"replay": True}, {"skewed": True}, {"broken": True}]
    cases = [Case(level, 2) for level in (1, 2, 3)]
    cases += [Case(level, 2, **what) for what in special for level in (1, 3)]
    for case, found in zip(cases, on_ranks(tmp_path, 2, *cases), strict=True):
        plain = replace(case, level=1, experts=1, broken=False)
        check(found, alone if plain == Case() else train(tmp_path, plain), case)


@pytest.mark.slow
def test_four_ranks_in_groups_of_two_and_four(tmp_path: Path, alone: dict[str, Any]) -> None:
    cases = [Case(level, experts) for experts in (1, 2, 4) for level in (1, 2, 3)]
    for case, found in zip(cases, on_ranks(tmp_path, 4, *cases), strict=True):
        check(found, alone, case)
        assert found["local"] == ([] if case.experts == 1 else [SHAPE.n_routed_experts // case.experts])


@pytest.mark.slow
def test_ranks_read_their_own_experts_alone(tmp_path: Path, alone: dict[str, Any]) -> None:
    save_pretrained(Case().model(), tmp_path / "weights")
    for count, experts in ((2, 2), (4, 2)):
        case = Case(3, experts, in_shares=True, after=f"state-{count}")
        [found] = on_ranks(tmp_path, count, case)
        check(found, alone, case)
        assert found["local"] == [SHAPE.n_routed_experts // experts]


def test_shares_of_experts_hold_what_is_given(tmp_path: Path) -> None:
    """On one process, for each rank in turn: what is read, and what is drawn, is a part of the whole."""
    whole = ours(SHAPE)
    layer = next(module for module in whole.modules() if isinstance(module, MoE))
    for rank in range(2):
        with torch.device("meta"):
            mine = ParallelMoE(MoE(SHAPE), 2, rank)
        mine.fill(lambda name, shape: getattr(layer.experts, name).detach().view(shape))
        expected = ParallelExperts(layer.experts, 2, rank)
        for (name, one), (_, other) in zip(
            mine.experts.named_parameters(), expected.named_parameters(), strict=True
        ):
            assert torch.equal(one, other), name
            assert getattr(one, "group_name") == "ep_size_2"  # noqa: B009 - DeepSpeed's


@pytest.mark.slow
def test_states_go_from_any_layout_to_any_other(tmp_path: Path) -> None:
    expected = train(tmp_path, Case(steps=STEPS + 1))
    layouts = {1: (0, 1, 3), 2: (1, 2, 3), 4: (1, 3)}
    for experts, levels in layouts.items():  # one kind of groups in a process
        on_ranks(tmp_path, 4, *[Case(level, experts, after=f"{experts}-{level}") for level in levels])
    saved = [path.name for path in tmp_path.iterdir() if path.is_dir()]
    assert len(saved) == 8
    for count, experts, levels in ((4, 1, (0, 2)), (4, 2, (1, 3)), (4, 4, (2, 3)), (2, 2, (1,))):
        cases = [Case(level, experts, before=state, steps=1) for level in levels for state in saved]
        for case, found in zip(cases, on_ranks(tmp_path, count, *cases), strict=True):
            assert found["losses"] == pytest.approx(expected["losses"][-2:], rel=CLOSE), case
            assert found["norms"] == pytest.approx(expected["norms"][-1:], rel=CLOSE), case
            assert found["loads"] == expected["loads"][-1:], case


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.02), ("fp8", 0.05)])
def test_lower_precisions_train_alike(tmp_path: Path, precision: str, tolerance: float) -> None:
    cases = [Case(level, 2, precision) for level in (1, 3)]
    expected = train(tmp_path, Case(1, 1, precision))
    for case, found in zip(cases, on_ranks(tmp_path, 2, *cases), strict=True):
        assert found["losses"] == pytest.approx(expected["losses"], rel=tolerance), case
        assert found["norms"] == pytest.approx(expected["norms"], rel=5 * tolerance), case
        assert [*found["fp8"][0]] == [*expected["fp8"][0]]
