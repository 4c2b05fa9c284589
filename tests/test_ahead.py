"""Rollout batches drawn some steps before their own: how old they are, and that nothing is lost of them."""

import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from bits import same_bits
from faults.lab import Lab, Shape
from remote_sampler import RemoteSampler
from rl_runs import go, go_killed_and_resumed, metrics_of
from tiny_runs import tiny_run

from r1pipe.config import RLConfig
from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.paths import RunFolder
from r1pipe.core.types import Completion
from r1pipe.model import load_pretrained
from r1pipe.runs import stopping
from r1pipe.train import run as runs
from r1pipe.train.rl import in_flight, loop
from r1pipe.train.rl.prompts import StepPrompts
from r1pipe.train.rollout import SamplingParams, Whole
from r1pipe.train.rollout.bundled import BundledSampler
from r1pipe.train.run import Run, open_run

WORDS = (
    *("stage=grpo", "stage.max_steps=5", "stage.save_every=1", "stage.keep=9", "stage.optim.lr=0.02"),
    *("stage.sampling.max_tokens=8", "stage.prompts_per_step=4", "stage.group_size=2"),
)
STALE = ("rollout/staleness/mean", "rollout/staleness/max")


def rollouts(folder: Path, step: int) -> list[dict]:
    return pq.read_table(folder / "rollouts" / f"step-{step}.parquet").to_pylist()


def drawn(folder: Path, step: int) -> list[tuple]:
    return [(row["prompt_id"], row["completion"]) for row in rollouts(folder, step)]


@pytest.fixture(scope="module")
def ahead(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs that nothing interrupts, by their async_steps."""
    place = tmp_path_factory.mktemp("ahead")
    folders = {k: tiny_run(place / str(k), *WORDS, f"engine.async_steps={k}") for k in (0, 2)}
    for folder in folders.values():
        go(folder)
    return folders


def test_a_batch_is_as_old_as_the_config_says(ahead):
    assert [[row[name] for name in STALE] for row in metrics_of(ahead[2])] == [
        [0, 0], [1, 1], [2, 2], [2, 2], [2, 2]
    ]  # fmt: skip
    assert not any(name in row for name in STALE for row in metrics_of(ahead[0]))
    # the prompts of each step are those without it, and so are the draws of the first step alone
    for step in range(1, 6):
        ids = [[row["prompt_id"] for row in rollouts(ahead[k], step)] for k in (0, 2)]
        assert ids[0] == ids[1]
        assert (drawn(ahead[0], step) == drawn(ahead[2], step)) == (step == 1)


def test_a_batch_is_what_the_older_weights_draw(ahead):
    """The slow way: the checkpoint of an earlier step draws the step's prompts."""
    with open_run(ahead[2], RLConfig) as run:
        run.load_chat()
        run.load_data()
        for step, version in ((3, 1), (4, 2)):  # finished steps
            prompts, _ = StepPrompts(run).take(step, (4 * step, 0))
            params = SamplingParams(8, n=2, seed=run.seed("sampling/0", step))
            sampler = BundledSampler(run.chat.eos_ids, run.chat.pad_id)
            for weights, same in ((version, True), (step, False)):
                model = load_pretrained(ahead[2] / "checkpoints" / f"step-{weights}")
                sampler.update(Whole(model), weights)
                found = sampler.generate([run.chat.prompt_tokens(prompt) for prompt in prompts], params)
                texts = [run.chat.response(completion.tokens) for completion in found]
                assert ([row["completion"] for row in rollouts(ahead[2], step + 1)] == texts) == same


def test_where_weights_do_not_move_drawing_ahead_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "update", lambda *given: {})
    one, other = (tiny_run(tmp_path / str(k), *WORDS, f"engine.async_steps={k}") for k in (0, 1))
    go(one)
    go(other)
    rows = [{name: value for name, value in row.items() if name not in STALE} for row in metrics_of(other)]
    assert rows == metrics_of(one)
    assert all(rollouts(one, step) == rollouts(other, step) for step in range(1, 6))


# --- what a checkpoint keeps


@pytest.mark.parametrize(
    "words",
    [
        [],
        [
            "stage.max_sampling_batches=2",
            "stage.reference_every=1",
            "stage.kl_coef=0.1",
            "stage.kl_in=reward",
        ],
        ["stage.algorithm=ppo", "engine.zero_level=2"],
    ],
)
def test_a_kill_loses_nothing_of_what_waits(words, ahead, tmp_path, monkeypatch):
    words = [*WORDS, "engine.async_steps=2", *words]
    whole = ahead[2] if len(words) == len(WORDS) + 1 else tiny_run(tmp_path / "whole", *words)
    broken = tiny_run(tmp_path / "broken", *words)
    if whole != ahead[2]:
        go(whole)
    calls = []
    generate = BundledSampler.generate
    monkeypatch.setattr(
        BundledSampler,
        "generate",
        lambda self, *given, **more: calls.append(1) or generate(self, *given, **more),
    )
    go_killed_and_resumed(broken, "step-3", monkeypatch)
    assert metrics_of(broken) == metrics_of(whole) and same_bits(broken, whole, 5)
    assert all(rollouts(broken, step) == rollouts(whole, step) for step in range(1, 6))
    if not words[len(WORDS) + 1 :]:
        # 3 batches in the first step, one in each of the next two, and one more in step 3, which is repeated
        # after the kill; the last two steps ask for none
        assert len(calls) == 3 + 1 + 1 + 1 + 2, "2 of evaluations; nothing that waited is drawn again"
    else:
        assert len(calls) > 4


def test_completions_are_kept_to_the_bit(tmp_path):
    experts = np.arange(12, dtype=np.int16).reshape(2, 3, 2)
    kept = {
        (7, 3): Completion([5, 2], [-0.1, -1e-30], "stop", versions=((1, 4), (1, 5)), experts=experts),
        (7, 1): Completion([9], [float(np.float32(-0.3))], "length"),
    }
    rows = [in_flight.row_of(*place, completion) for place, completion in kept.items()]
    in_flight.write(in_flight.table_of(rows), tmp_path / "engine")
    found = in_flight.read(tmp_path / "engine")
    assert np.array_equal(found[7, 3].experts, experts) and found[7, 3].experts.dtype == np.int16
    assert [replace(one, experts=None) for one in found.values()] == [
        replace(kept[place], experts=None) for place in found
    ]
    in_flight.write(in_flight.table_of([]), tmp_path / "none")
    assert in_flight.read(tmp_path / "none") == {} and not (tmp_path / "none").exists()


@pytest.mark.slow
@pytest.mark.parametrize("point", ["in sampling", "before a save"])
def test_two_ranks_lose_nothing_of_what_waits(point, tmp_path):
    lab, shape = Lab(tmp_path), Shape("grpo", 2, 3, ("engine.async_steps=2",))
    assert lab.killed(shape, lab.moment(shape, point, seed=0)) == []
    rows = metrics_of(lab.reference(shape).folder)
    assert [[row[name] for name in STALE] for row in rows] == [[0, 0], [1, 1], [2, 2], [2, 2]]


# --- a sampler in another process


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
        assert step == 2 or begun[step + 1].wait(600)
        return update(engine, *given)

    def pushes(sampler, weights, version):
        push(sampler, weights, version)
        came[version].set()

    def before(step: int) -> None:
        begun[step].set()
        assert came[step].wait(600)

    steps = Steps(monkeypatch, before)
    monkeypatch.setattr(loop, "update", trains)
    monkeypatch.setattr(RemoteSampler, "update", pushes)
    folder = tiny_run(tmp_path / "run", *SHORT, "engine.async_steps=1")
    go(folder)
    assert steps.samplers[0].versions == [0, 1, 2, 3] and steps.samplers[0].closed
    for step, row in enumerate(metrics_of(folder)):
        lengths = [one["length"] for one in rollouts(folder, step + 1)]
        old = sum(length - (length > 1) for length in lengths) / sum(lengths)  # all but the last tokens
        assert row["rollout/staleness/mean"] == (pytest.approx(old) if step else 0)
        assert row["rollout/staleness/max"] == min(step, 1)


def ids(folder: Path) -> list[list[str]]:
    return [[row["prompt_id"] for row in rollouts(folder, step)] for step in (1, 2, 3)]


def test_a_step_whose_sampler_fails_is_taken_again(tmp_path, monkeypatch):
    words = (*SHORT, "engine.async_steps=1")
    sound, unlucky = (tiny_run(tmp_path / name, *words) for name in ("sound", "unlucky"))
    steps = Steps(monkeypatch)
    go(sound)
    failures = iter([fail])
    steps.before = lambda step: step == 1 and next(failures, lambda step: None)(step)
    go(unlucky)
    assert steps.samplers[-1].versions == [0, 1, 1, 2, 3], "the step's weights are sent again"
    assert "step 2 is taken again: the server is gone" in (unlucky / "progress.jsonl").read_text()
    assert ids(unlucky) == ids(sound), "no prompt is passed over or seen twice"
    assert [row["step"] for row in metrics_of(unlucky)] == [1, 2, 3]


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
    update, asked = loop.update, threading.Event()

    def before(step: int) -> None:
        if step == 1:
            stopping.request(RunFolder(folder).stop, signal.SIGTERM)
            while not stopping.requested():
                time.sleep(0.01)
            asked.set()

    def trains(*given):
        assert asked.wait(600)
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
