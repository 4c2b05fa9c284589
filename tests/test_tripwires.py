"""Tripwires in numbers: each fault is reported with its cause, once. In real runs: test_unhealthy_runs.py."""

import re

import pytest

from r1pipe.config import RLConfig, WireConfig
from r1pipe.config.compose import compose
from r1pipe.config.rl import TRIPWIRES
from r1pipe.core.errors import ConfigError
from r1pipe.train.rl.tripwires import WIRES, Tripwires

HEALTHY = {
    "reward": 1.2, "frac_reward_zero_std": 0.3, "rewards/accuracy/failed": 0.0,
    "completions/clipped_ratio": 0.02, "completions/mean_length": 60.0, "completions/repetition": 0.4,
    "entropy": 0.6, "kl": 0.01, "sampling/sampling_logp_difference/mean": 1e-3, "router/max_vio": 0.5,
    "time/sampling_s": 2.0, "time/reward_s": 0.1, "time/update_s": 1.0,
}  # fmt: skip
FAULTY = {
    "truncation": ({"completions/clipped_ratio": 0.97}, r"97% of the completions were cut off.*max_tokens"),
    "no_variance": ({"frac_reward_zero_std": 1.0}, r"100% of the groups.*too easy or too hard"),
    "entropy": ({"entropy": 0.01}, r"entropy is 0.010 nats.*stopped exploring"),
    "kl": ({"kl": 9.0}, r"9.00 nats a token.*kl_coef"),
    "logprob_gap": ({"sampling/sampling_logp_difference/mean": 2.5}, r"differ by 2.500 nats.*stale"),
    "repetition": ({"completions/repetition": 0.95}, r"95% of the 4-grams.*loops"),
    "length": ({"completions/mean_length": 300.0}, r"5.0 times as long.*length is rewarded"),
    "verifier": ({"rewards/accuracy/failed": 0.4}, r"40% of a reward's verdicts failed.*sandbox"),
    "non_finite": ({"train/skipped": 2.0}, r"2 optimizer steps were skipped.*max_skipped"),
    "max_vio": ({"router/max_vio": 6.0}, r"6.0 times the mean above.*routing has collapsed"),
    "slow_step": ({"time/sampling_s": 60.0}, r"19.7 times the median.*another job"),
    "reward_hacking": (
        {"reward": 1.5, "eval/pass_at_1": 0.5},
        r"held-out accuracy 20.0% below its best.*gaming",
    ),
}


KL = "stage.kl_coef=0.001"  # recipe=laptop has none


def default() -> dict[str, WireConfig]:
    return compose(["stage=grpo"]).config.tripwires.wires


def watching(wires: dict[str, WireConfig], *words: str) -> Tripwires:
    stage = compose(["stage=grpo", *words]).config.stage
    assert isinstance(stage, RLConfig)
    return Tripwires(wires, stage)


def test_every_wire_has_limits_a_cause_and_a_test():
    assert WIRES.keys() == default().keys() == FAULTY.keys() == set(TRIPWIRES)


@pytest.mark.parametrize("name", FAULTY)
def test_a_fault_is_reported_once_with_its_cause(name):
    change, message = FAULTY[name]
    wires = watching(default(), KL)
    steps = default()[name].steps
    assert not wires.check(HEALTHY | {"eval/pass_at_1": 0.7})
    assert not [trip for _ in range(4) for trip in wires.check(HEALTHY)]
    found = [wires.check(HEALTHY | change) for _ in range(steps)]
    assert not any(found[:-1])
    [trip] = found[-1]
    assert trip.name == name and trip.action == "warn"
    assert re.search(message, trip.message), trip.message
    assert "\n" not in trip.message
    if name not in ("length", "slow_step", "non_finite"):  # these change what they are compared with
        assert not wires.check(HEALTHY | change), "not again while it lasts"
    assert not wires.check(HEALTHY | {"eval/pass_at_1": 0.7})
    again = [trip for _ in range(steps) for trip in wires.check(HEALTHY | change)]
    assert [trip.name for trip in again] == [name], "but anew when it comes back"


def test_a_wire_can_be_off_and_what_is_not_measured_trips_nothing():
    off = {name: WireConfig(wire.limit, 1, "off") for name, wire in default().items()}
    faulty = HEALTHY | {key: value for change, _ in FAULTY.values() for key, value in change.items()}
    assert not watching(off).check(faulty)
    assert not watching(default()).check({"reward": 1.0, "completions/mean_length": 5.0})


def test_a_wire_that_has_nothing_to_measure_is_told_and_does_not_trip():
    assert watching(default(), KL).describe_inactive() == ""
    for name in ("grpo", "zero", "all_scenario"):
        words = (f"stage={name}", "recipe=cluster")
        assert watching(default(), *words).describe_inactive() == "", name
    words = ("stage.kl_coef=0", "stage.eval.every=30", "stage.algorithm=ppo", "stage.group_size=1")
    alone = watching(default(), *words)
    assert alone.describe_inactive() == (
        "tripwires with nothing to measure in this run: "
        "no_variance (stage.group_size=1: there are no groups); "
        "kl (stage.kl_coef=0: there is no reference); "
        "reward_hacking (stage.eval.every=30: no two evaluations in 36 steps)"
    )
    assert not [trip for _ in range(3) for trip in alone.check(HEALTHY | {"frac_reward_zero_std": 1.0})]
    off = {name: WireConfig(wire.limit, 1, "off") for name, wire in default().items()}
    assert watching(off, *words).describe_inactive() == "", "nobody asked for them"


def test_the_verifiers_wire_comes_before_the_end_and_counts_as_the_end_does():
    config = compose(["stage=grpo"]).config
    assert config.tripwires.wires["verifier"].limit < config.stage.rewards.max_failed
    # in all_scenario half of the prompts have no rule: few completions lack a reward, many verdicts failed
    half = {"frac_reward_failed": 0.01, "rewards/accuracy/failed": 0.05, "rewards/format/failed": 0.0}
    assert [trip.name for trip in watching(default()).check(half)] == ["verifier"]
    assert not watching(default()).check(half | {"rewards/accuracy/failed": 0.01})


def test_skipped_steps_trip_when_more_are_skipped():
    wires = watching(default(), KL)
    of_steps = [None, 1, 1, 1, 3, 3]
    trips = [wires.check({} if n is None else {"train/skipped": float(n)}) for n in of_steps]
    assert [[trip.value for trip in found] for found in trips] == [[], [1.0], [], [], [2.0], []]
    assert [trip.name for trip in watching(default()).check({"value/skipped": 1.0})] == ["non_finite"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "tripwires.wires.kl.action=halt",
            "tripwires.wires.kl.action=halt is none of off, warn, pause, stop",
        ),
        ("tripwires.wires.kl.steps=0", "tripwires.wires.kl.steps=0 must be 1 or more"),
        ("+tripwires.wires.entrpy={limit: 1, steps: 1, action: warn}", "did you mean entropy"),
        ("tripwires=strct", "did you mean strict"),
    ],
)
def test_wrong_wires_are_refused(override, message):
    with pytest.raises(ConfigError, match=message):
        compose(["stage=grpo", override])
