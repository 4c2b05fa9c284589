"""Rollout batches drawn some steps before their own: how old they are, and that nothing is lost of them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from bits import same_bits
from faults.lab import Lab, Shape
from rl_runs import go, go_killed_and_resumed, metrics_of
from tiny_runs import tiny_run

from r1pipe.config import RLConfig
from r1pipe.core.types import Completion
from r1pipe.model import load_pretrained
from r1pipe.train.rl import in_flight, loop
from r1pipe.train.rl.prompts import StepPrompts
from r1pipe.train.rollout import SamplingParams, WholeWeights
from r1pipe.train.rollout.bundled import BundledSampler
from r1pipe.train.run import open_run

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
                sampler.update(WholeWeights(model), weights)
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
    drawn_for_training = []
    generate = BundledSampler.generate

    def generates(sampler, prompts, params, *given, **more):
        if params.max_tokens == 8:  # evaluations draw 4
            drawn_for_training.append(params.seed)
        return generate(sampler, prompts, params, *given, **more)

    monkeypatch.setattr(BundledSampler, "generate", generates)
    go_killed_and_resumed(broken, "step-3", monkeypatch)
    assert metrics_of(broken) == metrics_of(whole) and same_bits(broken, whole, 5)
    assert all(rollouts(broken, step) == rollouts(whole, step) for step in range(1, 6))
    again = len(drawn_for_training) - len({*drawn_for_training})
    # steps 3 and 4 were trained before the kill was noticed, and are repeated
    further = sum(row.get("rollout/batches", 1) - 1 for row in metrics_of(whole)[2:4])
    assert again == 1 + further, "besides dynamic sampling's, the last step's batch alone is asked for again"


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
