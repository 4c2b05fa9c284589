"""Tripwires: each sickness is told with its cause, once; a run pauses or stops where it is asked to."""

import json
import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console
from rl_runs import go, metrics_of
from tiny_runs import tiny_run

from r1pipe.config.compose import compose
from r1pipe.config.parts import WireConfig
from r1pipe.config.rules import TRIPWIRES
from r1pipe.errors import ConfigError
from r1pipe.progress import Display
from r1pipe.rl.tripwires import WIRES, Tripwires

HEALTHY = {
    "reward": 1.2, "frac_reward_zero_std": 0.3, "frac_reward_failed": 0.0, "completions/clipped_ratio": 0.02,
    "completions/mean_length": 60.0, "completions/repetition": 0.4, "entropy": 0.6, "kl": 0.01,
    "sampling/sampling_logp_difference/mean": 1e-3, "router/max_vio": 0.5, "time/sampling_s": 2.0,
    "time/reward_s": 0.1, "time/update_s": 1.0,
}  # fmt: skip
SICK = {
    "truncation": ({"completions/clipped_ratio": 0.97}, r"97% of the completions were cut off.*max_tokens"),
    "no_variance": ({"frac_reward_zero_std": 1.0}, r"100% of the groups.*too easy or too hard"),
    "entropy": ({"entropy": 0.01}, r"entropy is 0.010 nats.*stopped exploring"),
    "kl": ({"kl": 9.0}, r"9.00 nats a token.*kl_coef"),
    "logprob_gap": ({"sampling/sampling_logp_difference/mean": 2.5}, r"differ by 2.500 nats.*stale"),
    "repetition": ({"completions/repetition": 0.95}, r"95% of the 4-grams.*loops"),
    "length": ({"completions/mean_length": 300.0}, r"5.0 times as long.*length pays"),
    "verifier": ({"frac_reward_failed": 0.4}, r"40% of the completions could not be judged.*sandbox"),
    "max_vio": ({"router/max_vio": 6.0}, r"6.0 times the mean load.*routing has collapsed"),
    "slow_step": ({"time/sampling_s": 60.0}, r"19.7 times the median.*another job"),
    "reward_hacking": (
        {"reward": 1.5, "eval/pass_at_1": 0.5},
        r"held-out accuracy 20.0% below its best.*gaming",
    ),
}


def default() -> dict[str, WireConfig]:
    return compose(["stage=grpo"]).config.tripwires.wires


def test_every_wire_has_limits_a_cause_and_a_test():
    assert WIRES.keys() == default().keys() == SICK.keys() == set(TRIPWIRES)


@pytest.mark.parametrize("name", SICK)
def test_a_sickness_is_told_once_with_its_cause(name):
    change, message = SICK[name]
    wires = Tripwires(default())
    steps = default()[name].steps
    assert not wires.check(HEALTHY | {"eval/pass_at_1": 0.7})
    assert not [trip for _ in range(4) for trip in wires.check(HEALTHY)]
    found = [wires.check(HEALTHY | change) for _ in range(steps)]
    assert not any(found[:-1])
    [trip] = found[-1]
    assert trip.name == name and trip.action == "warn"
    assert re.search(message, trip.message), trip.message
    assert "\n" not in trip.message
    if name not in ("length", "slow_step"):  # these change what they are compared with
        assert not wires.check(HEALTHY | change), "not again while it lasts"
    assert not wires.check(HEALTHY | {"eval/pass_at_1": 0.7})
    again = [trip for _ in range(steps) for trip in wires.check(HEALTHY | change)]
    assert [trip.name for trip in again] == [name], "but anew when it comes back"


def test_a_wire_can_be_off_and_what_is_not_measured_trips_nothing():
    off = {name: WireConfig(wire.limit, 1, "off") for name, wire in default().items()}
    sick = HEALTHY | {key: value for change, _ in SICK.values() for key, value in change.items()}
    assert not Tripwires(off).check(sick)
    assert not Tripwires(default()).check({"reward": 1.0, "completions/mean_length": 5.0})


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


# --- in the loop: a random policy of 8 tokens never ends a text


def sick_run(folder: Path, action: str, *overrides: str) -> Path:
    return tiny_run(
        folder,
        *("stage=grpo", "stage.max_steps=4", "stage.save_every=0", "stage.sampling.max_tokens=8"),
        *("tripwires.wires.truncation.steps=2", f"tripwires.wires.truncation.action={action}", *overrides),
    )


def said(folder: Path) -> list[str]:
    rows = [json.loads(line) for line in (folder / "progress.jsonl").read_text().splitlines()]
    return [row["say"] for row in rows if "say" in row]


def test_a_warning_is_on_the_screen_and_among_the_metrics(tmp_path):
    folder = sick_run(tmp_path / "run", "warn")
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
    whole, paused = sick_run(tmp_path / "whole", "warn"), sick_run(tmp_path / "paused", "pause")
    go(whole)
    with pytest.raises(SystemExit) as ended:
        go(paused)
    assert ended.value.code == 2
    assert (
        "paused after step 2; the same command goes on from it: tripwire truncation"
        in (paused / "error.txt").read_text()
    )
    assert (paused / "checkpoints" / "step-2" / "manifest.json").exists()
    go(paused)
    assert (paused / "record.json").exists()
    assert metrics_of(paused) == metrics_of(whole)


def test_a_stop_saves_nothing_of_the_step(tmp_path):
    folder = sick_run(tmp_path / "run", "stop", "stage.save_every=1")
    with pytest.raises(SystemExit) as ended:
        go(folder)
    assert ended.value.code == 2
    assert "stopped in step 2, which is not saved" in (folder / "error.txt").read_text()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-1"]
