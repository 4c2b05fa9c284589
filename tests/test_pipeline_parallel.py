"""Pipeline parallelism: the same training wherever the layers are, in every schedule."""

import json
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
from tiny_runs import tiny_config
from torch import Tensor
from typer.testing import CliRunner

from r1pipe.cli.commands import app
from r1pipe.config import EngineConfig
from r1pipe.config.parts import rank_of
from r1pipe.core.errors import ConfigError
from r1pipe.model import Balance, save_pretrained
from r1pipe.model.mtp import mtp_loss_sum
from r1pipe.model.parts import Part
from r1pipe.model.policy import named_weights
from r1pipe.plan import timeline
from r1pipe.train.engine.discovery import discover
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.expert_parallel import share_out
from r1pipe.train.engine.passes import Pass
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.engine.schedule import Step, order_of
from r1pipe.train.engine.sharded import as_it_is, load_layers

SHAPE = tiny(num_hidden_layers=5, num_nextn_predict_layers=1)
# With a large epsilon AdamW's steps are nearly the gradients: weights that agree had gradients that did.
OPTIMIZER = replace(OPTIM, lr=0.3, warmup_steps=0, eps=1.0, weight_decay=0.1)
STEPS, ROWS, BALANCE = 2, 16, 0.1
CLOSE = 1e-6


@dataclass
class Rows:
    """A micro-batch: rows of two documents and padding."""

    tokens_BT: Tensor
    segments_BT: Tensor
    weight: float

    @property
    def positions(self) -> int:
        return self.tokens_BT.numel()


@dataclass(frozen=True)
class Case:
    """One way to train."""

    pipeline: int = 1
    schedule: str = "1f1b"
    experts: int = 1  # ranks that share them out
    level: int = 0
    precision: str = "fp32"
    recompute: bool = False
    offload: bool = False
    broken: bool = False  # one more step, in which a loss is not finite
    before: str | None = None  # the state to go on from
    after: str | None = None  # the state to leave behind
    steps: int = STEPS

    def engine(self, count: int) -> EngineConfig:
        config = engine_config(count, self.level, self.precision)
        cut = {"pipeline": self.pipeline, "schedule": self.schedule, "expert_parallel": self.experts}
        return replace(config, **cut, recompute=self.recompute, offload=self.offload)


def row(number: int) -> Tensor:
    """Two rows after one another are as long; others differ."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(1, SHAPE.vocab_size, (10 + number // 2 % 5,), generator=generator)


def micro_batches(rank: int, count: int) -> list[Rows]:
    """A rank's share, in micro-batches of different lengths: even ranks have twice as many of them."""
    share, size = ROWS // count, 1 + rank % 2
    micros = []
    for first in range(rank * share, (rank + 1) * share, size):
        tokens_BT = torch.stack([row(number) for number in range(first, first + size)])
        segments_BT = (torch.arange(tokens_BT.shape[1]) // 5 + 1).expand_as(tokens_BT).clone()
        segments_BT[:, -2:] = 0
        micros.append(Rows(tokens_BT, segments_BT, count / ROWS / 10))
    return micros


def read(model: Any, micro: Rows) -> tuple[Tensor, tuple[Balance]]:
    balance = Balance(micro.segments_BT, with_loss=True)
    return model.hidden(micro.tokens_BT, micro.segments_BT, balance), (balance,)


def learn(model: Any, micro: Rows, hidden_BTD: Tensor, balances: tuple[Balance]) -> tuple[Tensor, float]:
    learned_BT = (micro.segments_BT != 0).clone()
    learned_BT[:, 0] = False
    depths = model.model.mtp_hidden(hidden_BTD, micro.tokens_BT, micro.segments_BT, *balances)
    further = mtp_loss_sum(model.lm_head, depths, micro.tokens_BT, micro.segments_BT, learned_BT)
    targets_N = micro.tokens_BT[:, 1:][learned_BT[:, 1:]]
    sum_ = -model.lm_head(hidden_BTD[:, :-1][learned_BT[:, 1:]], targets_N).sum()
    return micro.weight * (sum_ + 0.3 * further), sum_.item()


def train(folder: Path, case: Case) -> dict[str, Any]:
    """What a case gives on the ranks of this job: steps, evaluation and weights."""
    count = discover().world_size
    model, config = ours(SHAPE), case.engine(count)
    if case.pipeline > 1:
        shared = partial(share_out, config=config, ranks=Ranks(config)) if case.experts > 1 else as_it_is
        model = load_layers(folder / "model", config, shared)  # which on_ranks has written
        assert any(not weight.numel() for weight in model.parameters())
    engine = Engine(model.train(), OPTIMIZER, ROUTER, config, total_steps=10)
    if case.before is not None:
        assert engine.load(folder / case.before) == {"here": case.before}
    passes = [
        Pass(engine.module, micro, read, learn, BALANCE, micro.weight)
        for micro in micro_batches(engine.rank, count)
    ]
    stats = [engine.train_step(passes) for _ in range(case.steps)]
    balances = float(sum(one.balance for one in passes if one.balance is not None)) / count
    results = engine.sum_over_ranks([sum(one.found for one in passes), balances])
    if case.after is not None:
        engine.save(folder / case.after, {"here": case.after})
    if case.broken:
        engine.max_skipped = 1
        if engine.rank == 0:  # the last rank finds it
            passes[0].micro.weight = math.nan
        assert engine.train_step(passes).broken  # and no weight has moved
    sent = {name: tensor.clone() for bucket in engine.buckets(1 << 14) for name, tensor in bucket.items()}
    with engine.gathered() as model:
        weights = {name: tensor.detach().clone() for name, tensor in named_weights(model).items()}
    assert sent.keys() == weights.keys() and all(torch.equal(sent[name], weights[name]) for name in sent)
    return {
        "losses": [s.loss for s in stats] + results,
        "norms": [s.grad_norm for s in stats],
        "loads": [s.loads_LE.tolist() for s in stats if s.loads_LE is not None],
        "weights": weights,
    }


def on_ranks(folder: Path, count: int, *cases: Case) -> list[dict[str, Any]]:
    save_pretrained(ours(SHAPE), folder / "model")
    return trained_on_ranks(folder, count, train, cases)


check = partial(trained_alike, tolerance=CLOSE)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One rank with all layers."""
    return train(tmp_path_factory.mktemp("alone"), Case())


def test_two_ranks_train_as_one_and_resume_exactly(tmp_path: Path, alone: dict[str, Any]) -> None:
    first = Case(2, "1f1b", after="state", steps=1)
    cases = [Case(2, "1f1b", broken=True), first, Case(2, "1f1b", before="state", steps=1)]
    whole, _, resumed = on_ranks(tmp_path, 2, *cases)
    check(whole, alone, cases[0])
    assert resumed["losses"][0] == whole["losses"][1] and resumed["norms"] == whole["norms"][1:]
    for name, tensor in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], tensor), name


def after_a_change_of_cuts(folder: Path, alone: dict[str, Any], *jobs: tuple[int, list[Case]]) -> None:
    """Each case, on so many ranks, saves after its first step; its second goes on from the states of the jobs
    before and after it, in a circle."""
    expected = {key: value[1:] if key != "weights" else value for key, value in alone.items()}
    saved = []
    for number, (count, cases) in enumerate(jobs):  # DeepSpeed takes one kind of groups in a process
        named = [replace(case, after=f"{number}-{n}", steps=1) for n, case in enumerate(cases)]
        on_ranks(folder, count, *named)
        saved += named
    for number, (count, cases) in enumerate(jobs):
        beside = {(number + apart) % len(jobs) for apart in (-1, 1)}
        resumed = [
            replace(case, before=state.after, steps=1)
            for case in cases
            for state in saved
            if int(str(state.after).split("-")[0]) in beside
        ]
        for case, found in zip(resumed, on_ranks(folder, count, *resumed), strict=True):
            check(found, expected, case)


def test_a_state_goes_on_in_another_cut(tmp_path: Path, alone: dict[str, Any]) -> None:
    after_a_change_of_cuts(tmp_path, alone, (2, [Case(2)]), (2, [Case(1, level=1)]))


def test_a_pass_is_the_sum_of_its_parts() -> None:
    """Parts one after another, in one process: as many layers as there are, or fewer parts."""
    model, [micro] = ours(SHAPE).train(), micro_batches(1, ROWS // 2)[:1]
    balances = []
    expected, _ = learn(model, micro, *read(model, micro))
    for count in (2, 3, 5):
        states_ND, found = None, None
        for number in range(count):
            part = Part(model, number, count)

            def through(one: Any, last: bool = part.is_last) -> Tensor | None:
                hidden, (balance,) = read(one, micro)
                value = learn(one, micro, hidden, (balance,))[0] if last else None
                balances.append(balance.total().item())
                return value

            found, states_ND = part.run(through, states_ND, training=True)
        assert found is not None and torch.equal(found, expected)
    whole = read(model, micro)
    learn(model, micro, *whole)
    assert [sum(balances[:2]), sum(balances[2:5]), sum(balances[5:])] == pytest.approx(
        [whole[1][0].total().item()] * 3
    )


def finished(schedule: str, count: int, micros: int, seconds: dict[str, float]) -> tuple[float, float]:
    """When an order ends and how long a rank waits, where a pass takes so long and messages no time."""
    orders = [order_of(schedule, count, rank, micros) for rank in range(count)]
    parts = len(rank_of(schedule, count))
    ends: dict[tuple[str, int, int], float] = {}
    at, clocks = [0] * count, [0.0] * count

    def before(step: Step) -> list[tuple[str, int, int]]:
        if step.kind == "F":
            return [("F", step.part - 1, step.micro)] if step.part else []
        if step.kind == "W":
            return [("I", step.part, step.micro)]
        last = step.part == parts - 1
        return [("F", step.part, step.micro) if last else ("I", step.part + 1, step.micro)]

    while any(at[rank] < len(orders[rank]) for rank in range(count)):
        for rank, order in enumerate(orders):
            while at[rank] < len(order):
                step = order[at[rank]]
                if step.kind in seconds:
                    needs = before(step)
                    if not all(need in ends for need in needs):
                        break
                    begin = max([clocks[rank], *(ends[need] for need in needs)])
                    clocks[rank] = begin + seconds[step.kind]
                    kind = "I" if step.kind == "B" else step.kind  # both give the gradient of the input
                    ends[kind, step.part, step.micro] = clocks[rank]
                at[rank] += 1
    busy = sum(seconds.get(step.kind, 0.0) for order in orders for step in order)
    return max(clocks), max(clocks) - busy / count


@pytest.mark.parametrize("count", [2, 4, 8])
def test_bubbles_are_those_of_the_formulas(count: int) -> None:
    forward, inputs, weights = 1.0, 1.25, 0.75
    seconds = {"F": forward, "B": inputs + weights, "I": inputs, "W": weights}
    _, bubble = finished("1f1b", count, 3 * count, seconds)
    assert bubble == pytest.approx((count - 1) * (forward + inputs + weights))
    halves = dict.fromkeys("FIW", 0.5) | {"B": 1.0}  # two parts a rank
    _, bubble = finished("dualpipev", count, 3 * count, halves)
    assert bubble == pytest.approx((count - 1) * (0.5 + 1.0 - 2 * 0.5))
    _, bubble = finished("zbv", count, 3 * count, {"F": 0.5, "I": 0.6, "W": 0.4})
    assert bubble == pytest.approx((count - 1) * 0.6)


@pytest.mark.parametrize("schedule", ["1f1b", "zbv", "dualpipev"])
@pytest.mark.parametrize("micros", [1, 2, 3, 7])
def test_every_pass_is_made_once_however_few_micro_batches(schedule: str, micros: int) -> None:
    parts, passes = rank_of(schedule, 3), list[Step]()
    for rank in range(3):
        own = [step for step in order_of(schedule, 3, rank, micros) if len(step.kind) == 1]
        assert all(parts[step.part] == rank for step in own)
        passes += own
        assert [s for s in order_of(schedule, 3, rank, micros, backward=False) if s.kind == "F"] == [
            step for step in own if step.kind == "F"
        ]
    for part in range(len(parts)):
        for micro in range(micros):
            kinds = sorted(step.kind for step in passes if step[1:] == (part, micro))
            assert kinds in (["B", "F"], ["F", "I", "W"])


EXPERTS = ["engine.zero_level=1", "engine.expert_parallel=2"]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["engine.ranks=3"], "engine.pipeline=2 must divide engine.ranks=3"),
        (["engine.pipeline=4", "engine.ranks=4"], "engine.pipeline=4 is more than model.num_hidden_layers=2"),
        (["engine.schedule=zbv"], "two parts a rank with engine.schedule=zbv, is more than"),
        (["engine.zero_level=2"], "engine.zero_level=2 with engine.pipeline=2"),
        (["model.tie_word_embeddings=true"], "give engine.schedule=zbv"),
        (["engine.equal=true"], "give engine.equal=false"),
        (EXPERTS, "engine.expert_parallel=2 times engine.pipeline=2 must divide engine.ranks=2"),
        ([*EXPERTS, "engine.ranks=4"], "a rank would have dense layers alone"),
        (["engine.pipeline=1", "engine.schedule=zbv"], "give engine.pipeline=2 or more"),
        (
            ["engine.recompute=true", "engine.schedule=zbv", "model.num_hidden_layers=4"],
            "does not go with engine.schedule=zbv; give 1f1b",
        ),
        (["stage.algorithm=ppo"], "stage.ppo needs engine.pipeline=1"),
        (["stage=reward_model"], "stage=reward_model needs engine.pipeline=1"),
    ],
)
def test_what_a_pipeline_cannot_do_is_refused_in_one_line(overrides: list[str], told: str) -> None:
    given = ["engine.ranks=2", "engine.pipeline=2"]
    given += [] if overrides[0].startswith("stage=") else ["stage=grpo"]
    with pytest.raises(ConfigError, match=told) as refused:
        tiny_config(*given, *overrides)
    assert "\n" not in str(refused.value)


def test_a_timeline_has_its_figures_and_its_picture(tmp_path: Path) -> None:
    passes = [
        [["F", 0, 0, 0.0, 1.0], ["B", 0, 0, 4.0, 6.0]],
        [["F", 1, 0, 1.0, 2.0], ["B", 1, 0, 2.0, 4.0]],
    ]
    path = tmp_path / "timeline.json"
    path.write_text(json.dumps({"schedule": "1f1b", "ranks": passes}))
    found = timeline.read(path)
    assert (found.span, found.bubble(), found.formula()) == (6.0, 3.0, 3.0)
    assert timeline.text(found, 12) == ["  0 FF......BBBB", "  1 ..FFBBBB...."]
    assert timeline.svg([found]).count("z") == 4 + timeline.svg([found]).split("<path")[0].count("z")
    picture = tmp_path / "timeline.svg"
    told = CliRunner().invoke(app, ["plan", "--timeline", str(tmp_path), "--svg", str(picture)]).output
    assert "a rank waits 3.000 s (50.0%); by the formula 3.000 s" in told
    assert picture.read_text() == timeline.svg([found])
    path.write_text('{"schedule": "1f1b", "ranks": [[]]}')
    with pytest.raises(ConfigError, match="a rank without passes"):
        timeline.read(path)


@pytest.mark.slow
def test_folded_schedules_and_precisions_on_two_ranks(tmp_path: Path, alone: dict[str, Any]) -> None:
    cases = [
        Case(2, "zbv"),
        Case(2, "dualpipev"),
        Case(2, "zbv", level=1),
        Case(2, "1f1b", level=1, recompute=True),
    ]
    for case, found in zip(cases, on_ranks(tmp_path, 2, *cases), strict=True):
        check(found, alone, case)
    rough = Case(2, "zbv", level=1, precision="bf16")
    expected = train(tmp_path, Case(level=1, precision="bf16"))
    [found] = on_ranks(tmp_path, 2, rough)
    assert found["losses"] == pytest.approx(expected["losses"], rel=0.02)


@pytest.mark.slow
def test_four_ranks_in_one_pipeline_or_two(tmp_path: Path, alone: dict[str, Any]) -> None:
    cases = [Case(4, "1f1b"), Case(2, "1f1b", level=1), Case(2, "zbv"), Case(2, "dualpipev", level=1)]
    for case, found in zip(cases, on_ranks(tmp_path, 4, *cases), strict=True):
        check(found, alone, case)


@pytest.mark.slow
def test_states_go_from_every_cut_to_others(tmp_path: Path, alone: dict[str, Any]) -> None:
    jobs = [
        (1, [Case()]),
        (2, [Case(2, "zbv", level=1)]),
        (2, [Case(level=3)]),
        (4, [Case(4, level=1), Case(2, "dualpipev")]),
        (4, [Case(2, experts=2, level=1)]),
    ]
    after_a_change_of_cuts(tmp_path, alone, *jobs)
