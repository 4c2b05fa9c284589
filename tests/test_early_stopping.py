"""A stage ends early when the metric of `stage.keep_best` has stopped improving."""

import json
from pathlib import Path

import pytest
from rl_runs import metrics_of
from test_signals import RL, SFT
from tiny_runs import load_stage, tiny_run

from r1pipe.config.compose import compose
from r1pipe.core.errors import ConfigError
from r1pipe.core.paths import RunFolder
from r1pipe.runs.retention import has_stalled

WATCHES = ("stage.keep_best=train/lr", "stage.keep_best_direction=min", "stage.save_every=1")
CONSTANT = ("stage.optim.schedule=constant", "stage.optim.warmup_steps=0", "stage.optim.min_lr=0")


@pytest.mark.parametrize(
    ("values", "direction", "stalled"),
    [
        ([1.0, 2.0, 3.0], "max", False),
        ([3.0, 2.0, 1.0], "max", True),
        ([3.0, 2.0, 1.0], "min", False),
        ([1.0, 1.0, 1.0], "max", True),  # no better is no improvement
        ([2.0, 1.0, 3.0], "max", False),
        ([1.0, 2.0], "min", False),  # too few to tell
        ([2.0, None, 1.0, 1.5], "max", True),  # steps without the metric do not count
    ],
)
def test_a_metric_has_stalled_when_its_last_values_are_no_better(
    tmp_path: Path, values: list[float | None], direction: str, stalled: bool
) -> None:
    lines = [
        {"step": step, "time": 0.0} | ({} if value is None else {"eval/pass_at_1": value})
        for step, value in enumerate(values, 1)
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert has_stalled(path, "eval/pass_at_1", direction, 2) == stalled


@pytest.mark.parametrize(("name", "words"), [("pretrain", SFT), ("grpo", RL)])
def test_a_stage_ends_with_the_step_at_which_patience_runs_out(
    tmp_path: Path, name: str, words: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """A constant learning rate never improves: with a patience of 2 the third step is the last."""
    early = (f"stage={name}", "stage.max_steps=6", "stage.early_stopping_patience=2", *WATCHES, *CONSTANT)
    folder = tiny_run(tmp_path / f"{name}-early", *[word for word in words if "=" in word], *early)
    load_stage(name).main(folder)
    record = json.loads(RunFolder(folder).record.read_text())
    assert record["steps"] == 3 and record["checkpoint"] == "checkpoints/step-3"
    assert [row["step"] for row in metrics_of(folder)] == [1, 2, 3]
    (line,) = [message for message in caplog.messages if "ends early" in message]
    assert "step 3 of 6" in line and "stage.keep_best=train/lr" in line


@pytest.mark.parametrize("words", [("stage=grpo",), ("stage=reward_model", "stage.keep_best=train/loss")])
def test_patience_without_a_metric_to_watch_is_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=r"early_stopping_patience=2 needs stage.keep_best=METRIC"):
        compose([*words, "stage.early_stopping_patience=2", "stage.save_every=1"])
