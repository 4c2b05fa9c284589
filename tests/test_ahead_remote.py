"""Drawing ahead with a sampler in another process: the overlap, and what its failures cost."""

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from bits import same_bits
from forked import LIMIT_S
from remote_sampler import RemoteSampler
from rl_runs import go, metrics_of
from test_ahead import WORDS, rollouts
from tiny_runs import tiny_run

from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.paths import RunFolder
from r1pipe.runs import stopping
from r1pipe.train import run as runs
from r1pipe.train.rl import loop
from r1pipe.train.rl.ahead import RolloutQueue
from r1pipe.train.rollout import SamplingParams
from r1pipe.train.run import Run


class Steps:
    """A RemoteSampler for the job that a test runs; `before` gets the step whose batch is drawn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None] = lambda step: None):
        self.samplers: list[RemoteSampler] = []
        self.before = before
        monkeypatch.setattr(runs, "open_sampler", self.opened)

    def opened(self, config, chat, *given) -> RemoteSampler:
        seeds = {Run.seed(SimpleNamespace(config=config), "sampling/0", step): step for step in range(9)}

        def before(params: SamplingParams) -> None:
            if params.seed in seeds:
                self.before(seeds[params.seed])

        self.samplers.append(RemoteSampler(chat, before))
        return self.samplers[-1]


def fail(step: int) -> None:
    raise EnvironmentProblem(f"the server is gone in step {step}")


SHORT = (*WORDS, "stage.max_steps=3", "stage.save_every=0")


def test_a_remote_sampler_draws_while_the_trainer_trains(tmp_path, monkeypatch):
    """Each batch begins before the step before its own is trained, and ends after its weights came."""
    begun, came = ([threading.Event() for _ in range(9)] for _ in range(2))
    update, push = loop.update, RemoteSampler.update

    def trains(engine, *given):
        step = steps.samplers[-1].versions[-1]
        assert step == 2 or begun[step + 1].wait(LIMIT_S)
        return update(engine, *given)

    def pushes(sampler, weights, version):
        push(sampler, weights, version)
        came[version].set()

    def before(step: int) -> None:
        begun[step].set()
        assert came[step].wait(LIMIT_S)

    steps = Steps(monkeypatch, before)
    monkeypatch.setattr(loop, "update", trains)
    monkeypatch.setattr(RemoteSampler, "update", pushes)
    folder = tiny_run(tmp_path / "run", *SHORT, "engine.async_steps=1")
    go(folder)
    assert steps.samplers[0].versions == [0, 1, 2, 3, 3] and steps.samplers[0].closed
    for step, row in enumerate(metrics_of(folder)):
        lengths = [one["length"] for one in rollouts(folder, step + 1)]
        old = sum(length - (length > 1) for length in lengths) / sum(lengths)  # all but the last tokens
        assert row["rollout/staleness/mean"] == (pytest.approx(old) if step else 0)
        assert row["rollout/staleness/max"] == min(step, 1)


def ids(folder: Path) -> list[list[str]]:
    return [[row["prompt_id"] for row in rollouts(folder, step)] for step in (1, 2, 3)]


@pytest.mark.parametrize("late", [False, True])
def test_a_step_whose_sampler_fails_loses_nothing(late, tmp_path, monkeypatch):
    """What fails before its step is asked for again with the next weights; later, the step is taken again."""
    folder = tiny_run(tmp_path / "run", *SHORT, "engine.async_steps=1")
    update, take, result = loop.update, RolloutQueue.take, RolloutQueue._result
    awaited, failures = threading.Event(), iter([fail])
    queues: list[RolloutQueue] = []

    def before(step: int) -> None:
        if step == 1:
            assert not late or awaited.wait(LIMIT_S)
            next(failures, lambda step: None)(step)

    def takes(queue, state, number=0):
        queues.append(queue)
        return take(queue, state, number)

    def waits(queue, batch):
        if batch.step == 1:
            awaited.set()
        return result(queue, batch)

    def trains(*given):
        if not late and len(queues) == 1:
            assert queues[0].waiting[1].drawing.exception(600)
        return update(*given)

    steps = Steps(monkeypatch, before)
    monkeypatch.setattr(RolloutQueue, "take", takes)
    monkeypatch.setattr(RolloutQueue, "_result", waits)
    monkeypatch.setattr(loop, "update", trains)
    go(folder)
    said = (folder / "progress.jsonl").read_text()
    assert ("step 2 is taken again: the server is gone" in said) == late
    assert ("the completions of step 2 are drawn again: the server is gone" in said) != late
    assert steps.samplers[-1].versions == ([0, 1, 1, 2, 3, 3] if late else [0, 1, 2, 3, 3])
    assert [row["step"] for row in metrics_of(folder)] == [1, 2, 3]
    drawn_once = [prompt for step in ids(folder) for prompt in dict.fromkeys(step)]
    assert len(drawn_once) == len({*drawn_once}) == 12, "no prompt is passed over or seen twice"


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_run_whose_sampler_is_lost_is_saved_and_goes_on_later(ahead, tmp_path, monkeypatch):
    words = (*SHORT, f"engine.async_steps={ahead}")
    sound, lost = (tiny_run(tmp_path / name, *words) for name in ("sound", "lost"))
    steps = Steps(monkeypatch)
    go(sound)
    steps.before = lambda step: step == 1 and fail(step)
    with pytest.raises(SystemExit) as left:
        go(lost)
    assert left.value.code == 2 and "the server is gone in step 1" in (lost / "error.txt").read_text()
    assert (lost / "checkpoints" / "step-1").is_dir(), "nothing of the first step is lost"
    steps.before = lambda step: None
    go(lost)
    assert ids(lost) == ids(sound)
    if not ahead:  # else what failed is drawn by newer weights
        assert metrics_of(lost) == metrics_of(sound) and same_bits(lost, sound, 3)


def test_a_request_to_stop_waits_for_no_batch_and_the_run_says_what_it_draws_again(tmp_path, monkeypatch):
    folder = tiny_run(tmp_path / "run", *SHORT, "engine.async_steps=1")
    update, training, asked = loop.update, threading.Event(), threading.Event()

    def before(step: int) -> None:
        if step == 1:
            assert training.wait(LIMIT_S)
            stopping.request(RunFolder(folder).stop, signal.SIGTERM)
            while not stopping.requested():
                time.sleep(0.01)
            asked.set()

    def trains(*given):
        training.set()
        assert asked.wait(LIMIT_S)
        return update(*given)

    steps = Steps(monkeypatch, before)
    monkeypatch.setattr(loop, "update", trains)
    with pytest.raises(SystemExit) as left:
        go(folder)
    assert left.value.code == 128 + signal.SIGTERM
    RunFolder(folder).stop.unlink()
    steps.before = lambda step: None
    go(folder)
    assert "1 rollout batches were not complete" in (folder / "progress.jsonl").read_text()
    assert [row["rollout/staleness/max"] for row in metrics_of(folder)] == [0, 0, 1]
