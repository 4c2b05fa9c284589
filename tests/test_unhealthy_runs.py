"""Faults planted in tiny runs of reinforcement: the tripwire of each trips, warns, pauses or stops."""

import copy
import json
import math
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
from rich.console import Console
from rl_runs import go, metrics_of
from tiny_runs import tiny_run

from r1pipe.core.types import Completion, Score, Status
from r1pipe.launch.progress import Display
from r1pipe.model.moe import gates
from r1pipe.train import resumable
from r1pipe.train.engine.engine import Engine
from r1pipe.train.rl import ahead, loop, scoring, stage
from r1pipe.train.rl.tripwires import WIRES
from r1pipe.train.rollout import SamplingParams, WholeWeights
from r1pipe.train.rollout.bundled import BundledSampler

SHORT = (
    "stage=grpo",
    "stage.save_every=0",
    "stage.sampling.max_tokens=8",
    "stage.rewards.truncation_penalty=0",
)


def limits(**wires: float) -> list[str]:
    """Overrides: trip in the first step beyond another limit than the default's."""
    given = [(f"tripwires.wires.{name}", limit) for name, limit in wires.items()]
    return [word for key, limit in given for word in (f"{key}.limit={limit}", f"{key}.steps=1")]


def trips(folder: Path) -> dict[str, int]:
    """Wire -> the first step that it tripped in; each is reported with its cause, and among the metrics."""
    rows = {row["step"]: row for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}
    path, found = folder / "tripwires.jsonl", {}
    for line in map(json.loads, path.read_text().splitlines() if path.exists() else []):
        assert f"tripwire/{line['name']}" in rows[line["step"]]
        assert line["message"].endswith(WIRES[line["name"]].cause)
        found.setdefault(line["name"], line["step"])
    return found


def said(folder: Path) -> list[str]:
    rows = [json.loads(line) for line in (folder / "progress.jsonl").read_text().splitlines()]
    return [row["say"] for row in rows if "say" in row]


def judged_by(monkeypatch: pytest.MonkeyPatch, verdict: Callable[[Completion, int, int], Score]) -> None:
    """In the place of the rules: accuracy by completion, its number, and the number of the step so far."""
    steps: list[int] = []

    def score_all(prompts, completions, names, verdicts=None):
        steps.append(len(steps) + 1)
        return [{"accuracy": verdict(one, n, len(steps))} for n, one in enumerate(completions)]

    monkeypatch.setattr(scoring, "score_all", score_all)


def even_share(completion: Completion, number: int = 0, step: int = 0) -> Score:
    return Score(sum(token % 2 == 0 for token in completion.tokens) / len(completion.tokens))


def test_a_learning_rate_that_destroys_the_policy(tmp_path, monkeypatch):
    """It leaves its reference behind, and soon says the same few tokens again and again."""
    judged_by(monkeypatch, even_share)
    words = (*SHORT, "stage.max_steps=6", "stage.optim.lr=1.0", "stage.kl_coef=0.001")
    go(folder := tiny_run(tmp_path / "run", *words, *limits(entropy=0.3, repetition=0.2)))
    found = trips(folder)
    assert found.keys() >= {"kl", "entropy", "repetition"} and found["kl"] == 1


def test_what_goes_wrong_around_the_policy(tmp_path, monkeypatch):
    """By the default limits: a constant reward while held-out accuracy falls, two experts for every token,
    a loss that is no number, answers that grow, a step that hangs."""
    began: list[int] = []
    seconds = [0.0]

    def clock() -> float:
        seconds[0] += 1
        return seconds[0]

    monkeypatch.setattr(resumable, "time", SimpleNamespace(monotonic=clock, time=time.time))

    def constant(completion, number, step):
        if number == 0:
            began.append(step)
            seconds[0] += 100 * (step == 5)
        return Score(1.0)

    judged_by(monkeypatch, constant)
    accuracies = iter([0.5, 0.5, 0.5, 0.4, 0.4, 0.4])
    monkeypatch.setattr(loop, "quick_evaluation", lambda *_: {"eval/pass_at_1": next(accuracies)})

    def growing(max_tokens: int, *rest: float, **where: int) -> SamplingParams:
        return SamplingParams(2 if len(began) < 3 else max_tokens, *rest, **where)

    monkeypatch.setattr(ahead, "SamplingParams", growing)
    load, train_step, taken = stage.load_policy, Engine.train_step, []

    def collapsed(run, **how):
        model = load(run, **how)
        for gate in gates(model):
            gate.e_score_correction_bias[:2] = 100.0
        return model

    def broken_once(engine, closures):
        taken.append(closures)
        return train_step(engine, [lambda: closures[0]() * math.nan] if len(taken) == 3 else closures)

    monkeypatch.setattr(stage, "load_policy", collapsed)
    monkeypatch.setattr(Engine, "train_step", broken_once)
    go(folder := tiny_run(tmp_path / "run", *SHORT, "stage.max_steps=6", "stage.eval.every=1"))
    found = trips(folder)
    assert found == {
        "truncation": 1, "no_variance": 2, "non_finite": 2, "max_vio": 3, "reward_hacking": 3, "length": 5,
        "slow_step": 5,
    }  # fmt: skip


def test_a_sampler_whose_weights_are_stale_and_a_run_without_a_reference(tmp_path, monkeypatch):
    kept = []

    def stale(sampler, engine, version):
        kept.append(copy.deepcopy(engine.module))
        sampler.weights = WholeWeights(kept[0])

    monkeypatch.setattr(BundledSampler, "update", stale)
    judged_by(monkeypatch, even_share)
    words = ("stage.max_steps=2", "stage.optim.lr=0.05", "stage.kl_coef=0")
    go(folder := tiny_run(tmp_path / "run", *SHORT, *words))
    assert trips(folder) == {"truncation": 1, "logprob_gap": 2}
    assert not [row for row in metrics_of(folder) if "kl" in row], "nobody measures it"
    [idle] = [line for line in said(folder) if "nothing to measure" in line]
    assert "kl (stage.kl_coef=0: there is no reference)" in idle
    assert "reward_hacking (stage.eval.every=0" in idle


@pytest.mark.parametrize("words", ["stage.kl_in=reward", "stage.algorithm=ppo"])
def test_a_kl_in_the_reward_is_watched_too(words, tmp_path, monkeypatch):
    judged_by(monkeypatch, even_share)
    settings = (*SHORT, words, "stage.max_steps=2", "stage.optim.lr=0.05", "stage.kl_coef=0.001")
    go(folder := tiny_run(tmp_path / "run", *settings, *limits(kl=0.05)))
    assert trips(folder)["kl"] == 2
    first, second = metrics_of(folder)
    assert first["kl"] == pytest.approx(0.0, abs=1e-3) and second["tripwire/kl"] == second["kl"]


def test_verdicts_that_fail_are_told_and_written_before_they_end_the_job(tmp_path, monkeypatch):
    """One in sixteen warns; with a quarter the job ends, and goes on as if that step had never been."""
    failed = Score(0.0, Status.INFRASTRUCTURE_FAILED, "no sandbox")
    settings = (*SHORT, "stage.max_steps=3")

    def once(completion, number, step):
        return failed if step == 1 and number == 0 else even_share(completion)

    judged_by(monkeypatch, once)
    go(whole := tiny_run(tmp_path / "whole", *settings))
    assert trips(whole) == {"truncation": 1, "verifier": 1}
    judged_by(monkeypatch, lambda one, n, step: failed if step == 3 and n < 4 else once(one, n, step))
    folder = tiny_run(tmp_path / "run", *settings)
    with pytest.raises(SystemExit) as ended:
        go(folder)
    assert ended.value.code == 2
    told = (folder / "error.txt").read_text()
    assert "step 3 trains nothing: 25% of the accuracy verdicts failed" in told
    assert "(accuracy: infrastructure_failed (no sandbox))" in told and "max_failed=0.1" in told
    rows = pq.read_table(folder / "rollouts" / "step-3.parquet").to_pylist()
    assert sum("no sandbox" in (row["failed"] or "") for row in rows) == 4
    lost = metrics_of(folder)[2]
    assert lost["tripwire/verifier"] == lost["frac_reward_failed"] == 0.25 and "train/loss" not in lost
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-2"]
    (folder / "error.txt").unlink()
    judged_by(monkeypatch, lambda one, n, step: even_share(one))
    go(folder)
    assert metrics_of(folder) == metrics_of(whole)
    assert (folder / "tripwires.jsonl").read_text() == (whole / "tripwires.jsonl").read_text()
    weights = [(run / "checkpoints" / "step-3" / "model.safetensors").read_bytes() for run in (folder, whole)]
    assert weights[0] == weights[1]


def test_a_verifier_that_always_fails_ends_the_first_step_with_its_rollouts(tmp_path, monkeypatch):
    judged_by(monkeypatch, lambda *_: Score(0.0, Status.VERIFIER_FAILED, "no answer in 5 s"))
    folder = tiny_run(tmp_path / "run", *SHORT, "tripwires=strict")
    with pytest.raises(SystemExit):
        go(folder)
    assert "no completion could be scored (accuracy: verifier_failed" in (folder / "error.txt").read_text()
    assert trips(folder)["verifier"] == 1 and (folder / "rollouts" / "step-1.parquet").exists()
    assert not list((folder / "checkpoints").iterdir()), "nothing was learned"


# --- what is done about it: a random policy of 8 tokens never ends a text


def unhealthy_run(folder: Path, action: str, *overrides: str) -> Path:
    return tiny_run(
        folder,
        *("stage=grpo", "stage.max_steps=4", "stage.save_every=0", "stage.sampling.max_tokens=8"),
        "tripwires.wires.slow_step.action=off",  # two runs are compared
        *("tripwires.wires.truncation.steps=2", f"tripwires.wires.truncation.action={action}", *overrides),
    )


def test_a_warning_is_on_the_screen_and_among_the_metrics(tmp_path):
    folder = unhealthy_run(tmp_path / "run", "warn")
    (folder / "progress.jsonl").touch()
    console = Console(width=200, record=True, file=StringIO())
    display = Display(folder, "grpo", console)
    go(folder)
    display.close()
    assert (folder / "record.json").exists()
    [told] = [line for line in said(folder) if "truncation" in line]
    assert told.startswith("step 2: tripwire truncation: ") and told in console.export_text().replace(
        "\n", ""
    )
    tripped = [row.get("tripwire/truncation") for row in metrics_of(folder)]
    assert tripped == [None, 1.0, None, None]


def test_a_pause_saves_and_the_same_command_goes_on_to_the_same_end(tmp_path):
    whole, paused = unhealthy_run(tmp_path / "whole", "warn"), unhealthy_run(tmp_path / "paused", "pause")
    go(whole)
    with pytest.raises(SystemExit) as ended:
        go(paused)
    assert ended.value.code == 2
    assert (
        "paused after step 2; the same command resumes from it: tripwire truncation"
        in (paused / "error.txt").read_text()
    )
    assert (paused / "checkpoints" / "step-2" / "manifest.json").exists()
    go(paused)
    assert (paused / "record.json").exists()
    assert metrics_of(paused) == metrics_of(whole) and trips(paused) == trips(whole)


def test_a_stop_saves_nothing_of_the_step(tmp_path):
    folder = unhealthy_run(tmp_path / "run", "stop", "stage.save_every=1")
    with pytest.raises(SystemExit) as ended:
        go(folder)
    assert ended.value.code == 2
    assert "stopped in step 2, which is not saved" in (folder / "error.txt").read_text()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-1"]
