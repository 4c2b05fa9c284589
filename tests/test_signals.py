"""SIGTERM and Ctrl-C: a checkpoint, then exit; what goes on has the bits of what was never interrupted."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from bits import equal, same_bits
from forked import codes, out, ranks, wait_until
from rl_runs import go, metrics_of
from safetensors.torch import load_file
from tiny_runs import load_stage, tiny_run

from r1pipe.runs import checkpoints, heartbeat, stopping
from r1pipe.train.engine.engine import Engine
from r1pipe.train.rl import reward_model
from r1pipe.train.rollout import batching as sampler

RL = (
    *("stage=grpo", "stage.max_steps=4", "stage.save_every=0", "stage.keep=9", "stage.optim.lr=0.01"),
    *("stage.sampling.max_tokens=8", "stage.reference_every=1", "stage.kl_coef=0.1", "stage.eval.every=2"),
    "engine.grace_s=3600",
)
SFT = (
    *("stage=pretrain", "stage.max_steps=4", "stage.save_every=0", "stage.batch_size=4", "stage.keep=9"),
    *("stage.sequence_length=64", "stage.optim.lr=0.01", "engine.grace_s=3600"),
)


def interrupt(calls: int, function: Callable) -> Callable:
    """The function, whose call number `calls` (from 1) begins with a SIGTERM to this process."""
    made = 0

    def wrapped(*arguments: Any, **keywords: Any) -> Any:
        nonlocal made
        made += 1
        if made == calls:
            os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments, **keywords)

    return wrapped


def steps_saved(folder: Path) -> list[int]:
    return checkpoints.steps(folder / "checkpoints")


def leaves(main: Callable[[Path], None], folder: Path) -> None:
    with pytest.raises(SystemExit) as left:
        main(folder)
    assert left.value.code == 128 + signal.SIGTERM
    assert not (folder / "record.json").exists()


@pytest.mark.parametrize(
    ("where", "name", "call", "saved"),
    [
        pytest.param(sampler._Batch, "run", 2, [], id="in the first step's sampling"),
        pytest.param(sampler._Batch, "run", 3, [1], id="in a later step's sampling"),
        pytest.param(Engine, "train_step", 3, [2], id="in an update, and in the evaluation after it"),
    ],
)
def test_reinforcement_goes_on_with_the_same_bits(where, name, call, saved, whole, tmp_path, monkeypatch):
    broken = tiny_run(tmp_path / "broken", *RL)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, interrupt(call, getattr(where, name)))
        leaves(go, broken)
    assert steps_saved(broken) == saved
    last = saved[-1] if saved else 0
    if last:
        assert [row["step"] for row in metrics_of(broken)] == list(range(1, last + 1))
        assert len(list((broken / "rollouts").iterdir())) == last, "nothing of the step that was abandoned"
    else:
        assert not (broken / "metrics.jsonl").exists() and not (broken / "rollouts").exists()
    go(broken)
    assert metrics_of(broken) == metrics_of(whole)
    assert same_bits(whole, broken, 4)
    for step in range(1, 5):
        tables = [pq.read_table(run / "rollouts" / f"step-{step}.parquet") for run in (whole, broken)]
        assert tables[0].equals(tables[1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tiny_run(tmp_path_factory.mktemp("signals") / "whole", *RL)
    go(folder)
    return folder


def test_a_checkpoint_that_is_there_is_not_written_again(tmp_path, monkeypatch):
    folder = tiny_run(tmp_path / "run", *RL, "stage.save_every=1", "stage.eval.every=0")
    written = []
    monkeypatch.setattr(
        checkpoints,
        "finish",
        lambda target, *rest, done=checkpoints.finish: (written.append(target.name), done(target, *rest)),
    )
    with monkeypatch.context() as patch:
        patch.setattr(sampler._Batch, "run", interrupt(2, sampler._Batch.run))
        leaves(go, folder)
    assert written == ["step-1"]


def test_training_on_a_corpus_stops_after_the_step(tmp_path, monkeypatch):
    whole, broken = (tiny_run(tmp_path / name, *SFT) for name in ("whole", "broken"))
    main = load_stage("pretrain").main
    main(whole)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "train_step", interrupt(2, Engine.train_step))
        leaves(main, broken)
    assert steps_saved(broken) == [2]
    with monkeypatch.context() as patch:  # and once more, in the evaluation at the end
        patch.setattr(sampler._Batch, "run", interrupt(1, sampler._Batch.run))
        leaves(main, broken)
    assert steps_saved(broken) == [2, 4]
    main(broken)
    assert metrics_of(broken) == metrics_of(whole) and same_bits(whole, broken, 4)
    assert json.loads((broken / "evaluation.json").read_text()) == json.loads(
        (whole / "evaluation.json").read_text()
    )


def test_reward_models_stop_after_a_step(tmp_path, monkeypatch):
    words = (
        "stage=reward_model",
        "stage.pairs=8",
        "stage.labels=8",
        "stage.held_out=4",
        "stage.batch_size=4",
    )
    whole, broken = (tiny_run(tmp_path / name, *words, "stage.keep=9") for name in ("whole", "broken"))
    main = load_stage("reward_model").main
    main(whole)
    steps = steps_saved(whole)[-1]
    with monkeypatch.context() as patch:
        patch.setattr(reward_model.Engine, "train_step", interrupt(1, Engine.train_step))
        leaves(main, broken)
    assert steps_saved(broken) == [1]
    main(broken)
    assert metrics_of(broken) == metrics_of(whole)
    for kind in ("helpful", "harmless"):
        paths = [
            next((run / "checkpoints" / f"step-{steps}" / kind).glob("*.safetensors"))
            for run in (whole, broken)
        ]
        assert equal(*map(load_file, paths))


# --- two ranks


def run_stage(folder: Path) -> None:
    go(folder)


def on_two(folder: Path, main: Callable[..., Any] = run_stage, *arguments: Any) -> list[int | None]:
    with ranks(folder, main, 2, *arguments) as processes:
        return codes(processes)


@pytest.mark.parametrize("level", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_two_ranks_leave_together_though_one_alone_was_asked(level, tmp_path):
    words = (*RL, "engine.ranks=2", f"engine.zero_level={level}", "stage.max_steps=6", "stage.eval.every=0")
    whole, broken = (tiny_run(tmp_path / name, *words) for name in ("whole", "broken"))
    assert on_two(whole) == [0, 0], out(whole)
    with ranks(broken, run_stage, 2) as processes:
        wait_until((broken / "metrics.jsonl").exists, "the first step")
        os.kill(processes[1].pid, signal.SIGTERM)
        assert codes(processes) == [143, 143], out(broken)
    last = steps_saved(broken)[-1]
    assert last == len(metrics_of(broken)) < 6, "a checkpoint of the last finished step"
    assert on_two(broken) == [0, 0], out(broken)
    assert metrics_of(broken) == metrics_of(whole) and same_bits(whole, broken, 6)


# --- the request itself


def test_the_file_asks_as_a_signal_does_and_a_second_request_ends_at_once(tmp_path, monkeypatch):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    with stopping.listening(tmp_path / "stop", grace_s=3600):
        assert stopping.requested() == 0
        stopping.request(tmp_path / "stop", signal.SIGINT)
        wait_until(stopping.requested, "the file is seen")
        assert stopping.requested() == signal.SIGINT and not left
        with pytest.raises(stopping.Interrupted, match="SIGINT") as interrupted:
            stopping.stop_if_requested(Alone())
        assert interrupted.value.exit_code == 130
        stopping.request(tmp_path / "stop", signal.SIGINT, at_once=True)
        wait_until(lambda: left, "the second request")
    assert {*left} == {130} and stopping.requested() == 0


class Alone:
    def agree_max(self, value: int) -> int:
        return value


def test_the_grace_ends_a_rank_that_does_not_leave(tmp_path, monkeypatch):
    left = []
    monkeypatch.setattr(os, "_exit", left.append)
    with stopping.listening(tmp_path / "stop", grace_s=0.5):
        began = time.monotonic()
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: left, "the end of the grace")
        assert {*left} == {143} and time.monotonic() - began >= 0.5


def test_a_second_signal_ends_a_rank_at_once(tmp_path, monkeypatch):
    left, before = [], signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(os, "_exit", left.append)
    with stopping.listening(tmp_path / "stop", grace_s=3600):
        os.kill(os.getpid(), signal.SIGTERM)
        assert not left
        os.kill(os.getpid(), signal.SIGTERM)
        assert left == [143]
    assert signal.getsignal(signal.SIGTERM) is before
    assert threading.active_count() == 1 or not [
        t for t in threading.enumerate() if t.name in ("stopping", "heartbeat")
    ]
    assert heartbeat._heart is None
