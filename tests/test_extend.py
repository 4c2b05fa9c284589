"""A larger stage.max_steps extends a finished run: from its state, with its lineage, and said so."""

import json
from pathlib import Path

import pytest
from bits import same_bits
from fakes import House
from rl_runs import go, metrics_of
from test_signals import RL, SFT
from tiny_runs import load_stage, tiny_run

from r1pipe.config.compose import compose
from r1pipe.core.paths import RunFolder
from r1pipe.launch import run_plan
from r1pipe.runs import checkpoints, lineage, record

FIRST, LONGER = "stage.max_steps=2", "stage.max_steps=4"


def finish(house: House, monkeypatch: pytest.MonkeyPatch, steps: int, *words: str) -> int:
    monkeypatch.setenv("FAKE_STEPS", str(steps))
    return house.call("run", *words)


def told(capsys: pytest.CaptureFixture) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_a_finished_run_is_extended_and_its_children_keep_their_parent(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert finish(house, monkeypatch, 1, "stage=cold_start") == 0
    assert finish(house, monkeypatch, 2, "stage=grpo", FIRST) == 0
    [run] = map(RunFolder, house.runs("grpo"))
    assert finish(house, monkeypatch, 1, "stage=rejection_sft", "stage.max_steps=1") == 0
    told(capsys)
    assert finish(house, monkeypatch, 4, "stage=grpo", LONGER, "stage.keep=1", "--dry-run") == 0
    assert run.record.exists() and "extends the finished run from step 2 to 4" in told(capsys)[0]
    assert finish(house, monkeypatch, 4, "stage=grpo", LONGER, "stage.keep=1") == 0
    schedule = compose(["stage=grpo"]).config.stage.optim.schedule
    keep = compose(["stage=grpo"]).config.stage.keep
    rate = (
        "stays the same" if schedule == "constant" else f"follows the {schedule} schedule of the longer run"
    )
    assert told(capsys)[0] == (
        f"{run.run_id}: extends the finished run from step 2 to 4 with stage.max_steps: 2 -> 4, stage.keep: "
        f"{keep} -> 1; the learning rate {rate} (--fresh starts a new run)"
    )
    assert house.runs("grpo") == [run.path]
    record, earlier = (json.loads(path.read_text()) for path in (run.record, run.earlier_record(2)))
    assert (record["steps"], earlier["steps"]) == (4, 2)
    [row] = [json.loads(line) for line in run.config_history.read_text().splitlines()]
    assert row["changed"]["stage.max_steps"] == [2, 4]
    child = lineage.checkpoint_of_run(RunFolder(house.runs("rejection_sft")[0]))
    found = list(lineage.ancestors(child))
    assert [ancestor.problem for ancestor in found] == [""] * len(found)
    assert f"{run.run_id}/checkpoints/step-2" in " ".join(one.parent.checkpoint for one in found)
    assert finish(house, monkeypatch, 4, "stage=grpo", LONGER, "--fresh") == 0
    assert len(house.runs("grpo")) == 2


def test_fewer_steps_or_another_change_besides_is_another_run(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(house, monkeypatch, 1, "stage=cold_start")
    finish(house, monkeypatch, 2, "stage=grpo", FIRST)
    finish(house, monkeypatch, 1, "stage=grpo", "stage.max_steps=1")
    assert len(house.runs("grpo")) == 2
    finish(house, monkeypatch, 4, "stage=grpo", LONGER, "stage.optim.lr=0.5")
    assert len(house.runs("grpo")) == 3


@pytest.mark.parametrize("cut", ["before config.json", "before the first step"])
def test_a_kill_while_a_run_is_reopened_loses_nothing(
    house: House, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    finish(house, monkeypatch, 1, "stage=cold_start")
    finish(house, monkeypatch, 2, "stage=grpo", FIRST)
    [run] = map(RunFolder, house.runs("grpo"))
    record.set_aside(run)
    if cut == "before the first step":
        config = json.loads(run.config.read_text())
        config["stage"]["max_steps"] = 4
        run.config.write_text(json.dumps(config))
    assert finish(house, monkeypatch, 4, "stage=grpo", LONGER) == 0
    assert house.runs("grpo") == [run.path] and json.loads(run.record.read_text())["steps"] == 4


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["stage=reward_model"], "it trains two models one after the other"),
        (
            ["stage=all_scenario", "stage.preference.last_steps=1"],
            "preference rewards belong to its last steps",
        ),
        (["stage=cold_start"], "its data gives no more steps in stage.epochs="),
    ],
)
def test_what_cannot_be_extended_is_refused_in_one_line(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, words: list[str], why: str
) -> None:
    for stage in ("cold_start", "grpo", "rejection_sft", "reward_model"):
        if f"stage={stage}" not in words:  # two runs of a stage in one second have no order
            finish(house, monkeypatch, 1, f"stage={stage}", "stage.max_steps=1")
    first = "stage.max_steps=3" if words == ["stage=cold_start"] else FIRST
    assert finish(house, monkeypatch, 2, *words, first, "--fresh") == 0
    before = house.runs()
    told(capsys)
    assert finish(house, monkeypatch, 4, *words, LONGER) == 2
    [line] = told(capsys)
    assert f"finished after 2 steps and cannot be extended with stage.max_steps=4: {why}" in line
    assert line.endswith("; --fresh starts a new run") and house.runs() == before
    assert finish(house, monkeypatch, 4, *words, LONGER, "--fresh") == 0


def test_a_run_without_its_state_cannot_be_extended(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    finish(house, monkeypatch, 2, "stage=pretrain", FIRST)
    (house.runs()[0] / "checkpoints" / "step-2" / checkpoints.ENGINE).rmdir()
    assert finish(house, monkeypatch, 4, "stage=pretrain", LONGER) == 2
    assert "the state to resume from, is missing; --fresh" in told(capsys)[-1]


# --- the job


def extend(folder: Path, words: tuple[str, ...]) -> None:
    """Have a finished run ask for what a longer one would."""
    record.set_aside(RunFolder(folder))
    longer = tiny_run(folder.with_name("asked"), *words)
    (folder / "config.json").write_text((longer / "config.json").read_text())


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_an_extended_run_has_the_schedule_and_on_a_constant_one_the_bits_of_a_longer_one(
    tmp_path: Path, schedule: str
) -> None:
    words = (*SFT, f"stage.optim.schedule={schedule}", "stage.optim.min_lr=0.0001", "stage.keep=1")
    main = load_stage("pretrain").main
    whole, short = tiny_run(tmp_path / "whole", *words), tiny_run(tmp_path / "short", *words, FIRST)
    main(whole)
    main(short)
    assert json.loads((short / "record.json").read_text())["steps"] == 2
    extend(short, words)
    main(short)
    rates = [[row["train/lr"] for row in metrics_of(run)] for run in (whole, short)]
    assert rates[0][2:] == rates[1][2:] and len(rates[1]) == 4
    if schedule == "constant":
        assert metrics_of(short) == metrics_of(whole) and same_bits(whole, short, 4)
    assert json.loads((short / "record.json").read_text())["steps"] == 4
    assert checkpoints.steps(short / "checkpoints") == [2, 4], "what the record of then names stays"


def test_reinforcement_that_is_extended_goes_on_with_new_prompts(tmp_path: Path) -> None:
    words = (*RL, "stage.optim.schedule=constant", "stage.eval.every=0")
    whole, short = tiny_run(tmp_path / "whole", *words), tiny_run(tmp_path / "short", *words, FIRST)
    go(whole)
    go(short)
    extend(short, words)
    go(short)
    assert metrics_of(short) == metrics_of(whole) and same_bits(whole, short, 4)


def test_only_max_steps_makes_an_extension() -> None:
    plan = run_plan.RunPlan(compose([]).config, RunFolder("nowhere"), run_plan.Action.RESUME)
    assert run_plan.extension_of(plan) is None
