"""Pipeline parallelism: the same training wherever the layers are, in every schedule."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import codes, ranks
from jobs import OPTIM, ROUTER, engine_config
from shapes import ours, tiny
from torch import Tensor

from r1pipe.config import EngineConfig
from r1pipe.model import Balance
from r1pipe.model.mtp import mtp_loss_sum
from r1pipe.model.policy import named_weights
from r1pipe.train.engine.discovery import discover
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.passes import Pass
from r1pipe.train.engine.patches import exit_immediately_with

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
    level: int = 0
    precision: str = "fp32"
    recompute: bool = False
    before: str | None = None  # the state to go on from
    after: str | None = None  # the state to leave behind
    steps: int = STEPS

    def engine(self, count: int) -> EngineConfig:
        config = engine_config(count, self.level, self.precision)
        cut = {"pipeline": self.pipeline, "schedule": self.schedule}
        return replace(config, **cut, recompute=self.recompute)


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
    engine = Engine(ours(SHAPE).train(), OPTIMIZER, ROUTER, case.engine(count), total_steps=10)
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


def job(folder: Path, cases: Sequence[Case]) -> None:
    torch.set_num_threads(1)
    for number, case in enumerate(cases):
        found = train(folder, case)
        if discover().rank == 0:
            torch.save(found, folder / f"found-{number}.pt")
    exit_immediately_with(0)


def on_ranks(folder: Path, count: int, *cases: Case) -> list[dict[str, Any]]:
    with ranks(folder, job, count, cases) as started:
        assert codes(started) == [0] * count, (folder / "out-0.txt").read_text()[-5000:]
    return [torch.load(folder / f"found-{number}.pt") for number in range(len(cases))]


def check(found: dict[str, Any], expected: dict[str, Any], case: Case, tolerance: float = CLOSE) -> None:
    assert found["loads"] == expected["loads"], case
    for key in ("losses", "norms"):
        assert found[key] == pytest.approx(expected[key], rel=tolerance), (case, key)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, tensor in expected["weights"].items():
        apart = (found["weights"][name] - tensor).abs().max().item()
        assert apart < tolerance * max(1.0, tensor.abs().max().item()), (case, name)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One rank with all layers."""
    return train(tmp_path_factory.mktemp("alone"), Case())


def test_two_ranks_train_as_one(tmp_path: Path, alone: dict[str, Any]) -> None:
    cases = [Case(2, "1f1b"), Case(2, "zbv"), Case(2, "dualpipev"), Case(2, "zbv", 1)]
    for case, found in zip(cases, on_ranks(tmp_path, 2, *cases), strict=True):
        check(found, alone, case)
