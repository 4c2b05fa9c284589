"""The panel of reinforcement on a terminal: figures, one completion, whatever the width and the text."""

import io
import json
import re

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console
from rl_runs import go
from runfolders import write_lines
from tiny_runs import tiny_run

from r1pipe.launch.panel import Step, cut, lines_of, mask_controls
from r1pipe.launch.progress import Display
from r1pipe.train.rl.rows import SHOWN_END, sample_of

METRICS = {
    "step": 12, "time": 40.0, "reward": 0.43, "reward_std": 0.472, "frac_reward_zero_std": 0.25,
    "frac_reward_failed": 0.125, "rewards/accuracy/mean": 0.328, "rewards/accuracy/std": 0.4,
    "rewards/accuracy/failed": 0.125, "rewards/format/mean": 0.188, "completions/mean_length": 46.0,
    "completions/min_length": 7.0, "completions/max_length": 214.0, "completions/clipped_ratio": 0.031,
    "completions/repetition": 0.069, "kl": 0.0019, "entropy": 0.119, "clip_ratio/low_mean": 0.0004,
    "clip_ratio/high_mean": 0.002, "importance_ratio/mean": 1.0, "importance_ratio/min": 0.793,
    "importance_ratio/max": 1.23, "sampling/sampling_logp_difference/mean": 0.0016, "tokens_per_s": 1555.0,
    "sampling/tokens_per_s": 7252.0, "train/tokens_per_s": 3667.0, "time/sampling_s": 0.4,
    "time/update_s": 1.4,
    "time/step_s": 1.9, "eval/pass_at_1": 0.805,
}  # fmt: skip
FIGURES = [
    *("0.43 ± 0.472", "accuracy 0.328", "format 0.188", "zero variance 25%", "failed 12.5%"),
    *("46 (7 to 214)", "clipped 3.1%", "repetition 6.9%", "KL 0.0019", "entropy 0.119"),
    *("clip ratio low 0.04%", "high 0.2%", "ratio 1 (0.793 to 1.23)", "logprob gap 0.0016"),
    *(
        "step 1,555",
        "sampling 7,252",
        "update 3,667",
        "sampling 0.4s",
        "update 1.4s",
        "pass@1 80.5% (step 12)",
    ),
]
SAMPLE = {"task": "word", "reward": 1.2, "advantage": 0.94, "truncated": False, "question": "How many?"}


def drawn(step: Step, width: int = 100, height: int = 40, color: str | None = None) -> str:
    console = Console(
        file=io.StringIO(),
        width=width,
        height=height,
        force_terminal=True,
        color_system=color,
        legacy_windows=False,
    )
    console.print(step)
    return console.file.getvalue()


def panel(completion: str = "<think>\n2+2\n</think>\n\n4", **changes) -> Step:
    step = Step("grpo")
    step.update(METRICS)
    step.sample = SAMPLE | {"completion": completion} | changes
    return step


@pytest.mark.parametrize("width", [60, 100, 140])
def test_every_figure_is_whole_on_a_line_at_any_width(width):
    lines = drawn(panel(), width).splitlines()
    assert all(cell_len(line) == width for line in lines)
    assert [figure for figure in FIGURES if not any(figure in line for line in lines)] == []
    assert "grpo step 12" in lines[0] and "word   reward 1.2   advantage +0.94" in "".join(lines)


def test_what_was_not_logged_is_left_out_and_supervised_stages_have_no_panel():
    assert lines_of({"reward": 1.0}) == {"reward": ["1"]}
    step = Step("cold_start")
    step.update({"step": 1, "train/loss": 2.0})
    assert drawn(step).strip() == ""


def test_the_newest_evaluation_stays_though_it_is_not_of_every_step():
    step = panel()
    step.update({"step": 13, "reward": 0.5})
    assert "pass@1 80.5% (step 12)" in drawn(step) and "grpo step 13" in drawn(step)


@pytest.mark.parametrize(("advantage", "code"), [(0.9, "\x1b[32m"), (-0.9, "\x1b[31m")])
def test_the_completion_is_green_above_zero_and_red_below(advantage, code):
    text = drawn(panel("four", advantage=advantage), color="standard")
    assert f"{code}four" in text and text.count("\x1b[32m") + text.count("\x1b[31m") == text.count(code)
    neutral = drawn(panel("four", advantage=0.0), color="standard")
    assert "\x1b[32m" not in neutral and "\x1b[31m" not in neutral


def test_a_completion_is_shown_as_it_is_and_moves_no_cursor():
    text = drawn(
        panel("[bold red]4[/] \x1b[2J\x1b]0;title\x07 a\rb\u202ec [/nothing]", question="[link=x]?[/link]")
    )
    assert "[bold red]4[/] �[2J�]0;title� a�b�c [/nothing]" in text and "[link=x]?[/link]" in text
    assert not set(text) & {"\x1b", "\x07", "\r", "\u202e"}
    assert mask_controls("四\n\tok") == "四\n\tok"


@pytest.mark.parametrize("height", [24, 30, 50])
def test_a_long_completion_keeps_its_ends_and_the_panel_fits_the_screen(height):
    text = drawn(panel("begin " + "word " * 900 + "the end"), 100, height)
    assert "begin" in text and "the end" in text and re.search(r"… \d+ lines …", text)
    assert len(text.splitlines()) <= height - 3, "two lines of progress, and one to spare"
    assert cut(["a"] * 4, 4) == ["a"] * 4 and len(cut(["a"] * 9, 4)) == 4


def test_wide_characters_and_small_screens():
    lines = drawn(panel("答案是" * 60), 60, 10).splitlines()
    assert all(cell_len(line) == 60 for line in lines)


# --- in the display


def test_the_display_draws_it_on_a_terminal_alone(tmp_path):
    sample = {"time": 1.0, "sample": SAMPLE | {"completion": "[4]"}}
    for terminal in (True, False):
        folder = tmp_path / str(terminal)
        folder.mkdir()
        console = Console(
            file=io.StringIO(), width=100, height=40, force_terminal=terminal, color_system=None
        )
        display = Display(folder, "grpo", console)
        write_lines(folder / "metrics.jsonl", [METRICS])
        progress = {
            "time": 1.0,
            "what": "train",
            "done": 12,
            "total": 64,
            "unit": "steps",
            "show": {"reward": 0.43},
        }
        write_lines(folder / "progress.jsonl", [sample, progress])
        display.poll()
        display.close()
        text = console.file.getvalue()
        assert ("clip ratio low" in text) == ("[4]" in text) == terminal
        assert "grpo  train 12/64 steps  reward 0.43" in text.splitlines()[-1]


def test_a_job_tells_one_completion_a_step(tmp_path):
    folder = tiny_run(
        tmp_path / "run",
        *("stage=grpo", "stage.max_steps=2", "stage.save_every=0", "stage.sampling.max_tokens=8"),
    )
    go(folder)
    rows = [json.loads(line) for line in (folder / "progress.jsonl").read_text().splitlines()]
    told = [row["sample"] for row in rows if "sample" in row]
    assert len(told) == 2 and all(row.keys() == SAMPLE.keys() | {"completion"} for row in told)
    step = Step("grpo")
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        step.update(json.loads(line))
    shown = lines_of(step.metrics)
    assert shown.keys() == {"reward", "length", "policy", "sampler", "tokens/s", "time"}
    assert [figure.split()[0] for figure in shown["policy"]] == ["KL", "entropy", "clip", "high", "ratio"]


def row(has_variance: bool, completion: str, question: str = "Tom has 2.\nHow many?") -> dict:
    told = {"task": "word", "reward": 1.0, "advantage": 0.5, "truncated": False, "trained": True}
    return {**told, "question": question, "completion": completion, "has_variance": has_variance, "length": 3}


def test_the_completion_is_of_a_group_that_teaches_and_a_long_one_loses_its_middle():
    rows = [row(False, "a"), row(True, "b"), row(True, "c")]
    drawn = [sample_of(rows, np.random.default_rng(seed)) for seed in range(20)]
    assert {one["completion"] for one in drawn} == {"b", "c"} and drawn[0]["question"] == "How many?"
    assert sample_of(rows, np.random.default_rng(3)) == drawn[3]
    [alone] = [sample_of([row(False, "x" * 3000 + "end", "")], np.random.default_rng(0))]
    assert len(alone["completion"]) == 2 * SHOWN_END + 3 and alone["completion"].endswith("end")
    assert alone["question"] == ""
