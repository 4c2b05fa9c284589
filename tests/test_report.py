"""The table of stages, the screen and the report: right where all is there, usable where parts miss."""

import io
import json
import math
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from rich.console import Console
from runfolders import CONTROLS, MENDED, STAGES, WRONG, build, build_all, write_json, write_lines

from r1pipe.cli import compare
from r1pipe.cli.report import write_report
from r1pipe.cli.report.charts import running_mean
from r1pipe.cli.report.load import cost, load_runs, other_runs
from r1pipe.cli.report.page import MAIN_SETTINGS
from r1pipe.cli.report.story import Said, marked, telling
from r1pipe.config.compose import compose
from r1pipe.config.describe import leaves
from r1pipe.core.errors import CheckpointError
from r1pipe.core.formatting import duration, number, percent
from r1pipe.core.reflection import corrections
from r1pipe.launch.progress import Display
from r1pipe.runs import machine, results

SCRIPTS_RELY_ON = {
    *(
        "stage",
        "seed",
        "pass_at_1",
        "pass_at_1_ci",
        "cons_at_k",
        "samples",
        "format_rate",
        "wall_s",
        "run_id",
        "run_dir",
    ),
    *("language_consistency", "length_mean", "truncation_rate", "general_score", "preference_score"),
}


def printed(rows: list[dict], width: int, terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    compare.show(rows, console)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def reproduction(tmp_path_factory) -> Path:
    """Two seeds of everything, and one interrupted run; tests only read it."""
    root = tmp_path_factory.mktemp("runs")
    build_all(root, seeds=(0, 1))
    build(root, "grpo", finished=False, run_id="grpo-interrupted")
    return root


@pytest.fixture(scope="module")
def report(reproduction) -> str:
    return write_report(reproduction).read_text(encoding="utf-8")


# --- compare


def test_rows_are_in_the_recipes_order_with_the_keys_that_scripts_rely_on(reproduction):
    rows = results.rows(reproduction)
    assert [(row["stage"], row["seed"]) for row in rows] == [
        (s, n) for s in STAGES + CONTROLS for n in (0, 1)
    ]
    assert all(row.keys() >= SCRIPTS_RELY_ON for row in rows)
    grpo = next(row for row in rows if row["stage"] == "grpo")
    assert (grpo["pass_at_1"], grpo["samples"], grpo["run_id"]) == (0.79, 2000, "grpo-0")
    assert Path(grpo["run_dir"]) == (reproduction / "grpo-0").resolve()
    assert json.loads(results.as_json(rows)) == rows


def test_the_newest_finished_run_of_a_stage_and_seed_stands(tmp_path):
    build(tmp_path, "grpo", run_id="a", created="2026-01-01T12:00:00+00:00")
    build(tmp_path, "grpo", run_id="b", created="2026-01-01T09:00:00+00:00")
    build(tmp_path, "grpo", run_id="c", finished=False)
    assert [row["run_id"] for row in results.rows(tmp_path)] == ["a"]
    assert [row["run_id"] for row in results.rows(tmp_path, ["b", str(tmp_path / "a")])] == ["b", "a"]
    assert results.rows(tmp_path, pipeline="other") == []


def test_unknown_and_unfinished_runs_are_named(tmp_path):
    build(tmp_path, "grpo", run_id="grpo-s0-1")
    build(tmp_path, "grpo", run_id="half", finished=False)
    with pytest.raises(CheckpointError, match="grpo-s0-1"):
        results.rows(tmp_path, ["grpo-s0-2"])
    with pytest.raises(CheckpointError, match="half has not finished"):
        results.rows(tmp_path, ["half"])


def test_broken_and_poor_records_do_not_stop_the_table(tmp_path, capsys):
    folder = build(tmp_path, "grpo")
    record = json.loads((folder / "record.json").read_text())
    poor = {key: record[key] for key in ("stage", "pipeline", "created", "checkpoint", "checkpoint_hash")}
    write_json(folder / "record.json", poor | {"metrics": {"pass_at_1": math.nan}})
    (build(tmp_path, "zero") / "record.json").write_text('{"stage": "zero", "se')
    rows = results.rows(tmp_path)
    skipped = capsys.readouterr().err
    assert skipped.count("\n") == 1 and "skipped 1 damaged run(s) (zero-0)" in skipped
    with pytest.raises(CheckpointError, match=r"zero-0/record.json is not valid JSON"):
        results.rows(tmp_path, ["zero-0"])
    assert [(row["stage"], row["pass_at_1"], row["wall_s"]) for row in rows] == [("grpo", None, None)]
    assert "grpo" in printed(rows, 100)
    assert "No finished run" in printed([], 100)


def test_the_table_fits_and_keeps_controls_apart(reproduction):
    rows = results.rows(reproduction)
    wide = printed(rows, 40)  # a pipe, not a terminal: nothing is left out
    assert max(map(len, wide.splitlines())) <= 100
    assert "79.0 77-81" in wide and "cons" in wide and "…" not in wide
    assert wide.index("all_scenario") < wide.index("controls") < wide.index("zero")
    narrow = printed(rows, 80, terminal=True)
    assert max(map(len, narrow.splitlines())) <= 80 and "…" not in narrow
    assert "a wider terminal shows: cons" in narrow


def test_numbers_for_people():
    assert [duration(s) for s in (None, 4.2, 42.0, 185, 7800, 100_000)] == [
        "-",
        "4.2s",
        "42s",
        "3m05s",
        "2h10m",
        "1d03h",
    ]
    assert [number(v) for v in (None, 0.01234, 66.4, 21_300.4)] == ["-", "0.0123", "66.4", "21,300"]
    assert [percent(v) for v in (None, 0.8534)] == ["-", "85.3"]


# --- progress


def progress_row(time: float, what: str, done: int, total: int, **show) -> dict:
    return {"time": time, "what": what, "done": done, "total": total, "unit": "steps", "show": show}


def test_without_a_terminal_a_line_per_phase_and_one_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("r1pipe.launch.progress.QUIET_S", math.inf)
    console = Console(file=io.StringIO(), width=60)
    before = progress_row(0, "loading data", 1, 2)  # of a session that was interrupted
    write_lines(tmp_path / "progress.jsonl", [before])
    display = Display(tmp_path, "grpo", console)
    display.poll()
    for step in range(1, 20):
        rows = [
            progress_row(2.0 * step, "sampling", 256, 256),
            progress_row(2.0 * step + 1, "train", step, 64, reward=0.5),
        ]
        write_lines(tmp_path / "progress.jsonl", rows)
        display.poll()
    with (tmp_path / "progress.jsonl").open("a") as file:
        file.write("not json\n" + '{"what": "train", "done": 20')
    assert console.file.getvalue().count("\n") == 2, "one line per new phase; the rest waits"
    assert "loading data" not in console.file.getvalue()
    monkeypatch.setattr("r1pipe.launch.progress.QUIET_S", 0.0)
    garbled = progress_row(41, "train", 20, 64)  # a killed job's half line, and the next job's first
    write_lines(tmp_path / "progress.jsonl", [garbled, progress_row(43, "train", 21, 64, reward=0.75)])
    display.poll()
    last = console.file.getvalue().splitlines()[-1]
    assert last.startswith("grpo  train 21/64 steps, 1m26s left  reward 0.75"), "43 steps at 2 s"
    display.close()
    assert "train 21/64 steps  reward 0.75  in " in console.file.getvalue().splitlines()[-1]


def test_on_a_terminal_the_live_lines_show_the_numbers_and_go_away(tmp_path):
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system=None)
    display = Display(tmp_path, "grpo", console)
    write_lines(
        tmp_path / "progress.jsonl",
        [progress_row(2, "train", 1, 64), progress_row(4, "train", 2, 64, reward=0.625)],
    )
    display.poll()
    display._live.refresh()
    display.say("MLflow: one line")
    text = console.file.getvalue()
    assert "2/64 steps" in text and "2 s each" in text and "2m04s left" in text and "reward 0.625" in text
    assert "MLflow: one line" in text
    display.close()
    assert console.file.getvalue().rstrip().endswith("s")
    assert "train 2/64 steps  reward 0.625" in console.file.getvalue().splitlines()[-1]


def test_named_runs_stand_by_their_id_with_the_settings_that_differ(tmp_path):
    for run_id, rate in (("low", 1e-4), ("high", 3e-4), ("other", 3e-4)):
        folder = build(tmp_path, "grpo", run_id=run_id, created=f"2026-01-01T1{len(run_id)}:00:00")
        config = json.loads((folder / "config.json").read_text())
        config["stage"]["optim"]["lr"] = rate
        config["root"] = run_id  # does not change what a run computes
        config["pipeline"] = "mine" if run_id == "other" else "laptop"
        write_json(folder / "config.json", config)
    rows = results.rows(tmp_path, ["high", str(tmp_path / "low")])
    assert [(row["run_id"], row["settings"]) for row in rows] == [
        ("high", {"stage.optim.lr": 3e-4}),
        ("low", {"stage.optim.lr": 1e-4}),
    ]
    shown = printed(rows, 40)
    assert shown.splitlines()[0].split()[:3] == ["run", "stage.optim.lr", "seed"]
    assert shown.splitlines()[1].split()[:2] == ["high", "0.0003"]
    narrow = printed(rows, 50, terminal=True)
    assert max(map(len, narrow.splitlines())) <= 50 and "a wider terminal shows: cons" in narrow
    of_stage = results.rows(tmp_path, ["grpo"], "laptop")
    assert [row["run_id"] for row in of_stage] == ["low", "high"], "every one of the stage, oldest first"
    with pytest.raises(CheckpointError, match="other pipelines have one: pipeline=laptop"):
        results.rows(tmp_path, ["grpo"], "nobody's")
    assert "settings" not in results.rows(tmp_path)[0]


def test_the_counts_below_the_table_are_those_of_each_row(tmp_path):
    for stage, problems in (("cold_start", 500), ("grpo", 40), ("rejection_sft", 500)):
        folder = build(tmp_path, stage)
        record = json.loads((folder / "record.json").read_text())
        record["metrics"] |= {"problems": problems, "samples": 4 * problems}
        write_json(folder / "record.json", record)
    shown = " ".join(printed(results.rows(tmp_path), 100).split())
    assert "mean over 2,000 samples of 500 held-out problems (cold_start, rejection_sft)" in shown
    assert "mean over 160 samples of 40 held-out problems (grpo)" in shown


# --- the story


def story_of(report: str) -> str:
    return report[report.index("<h2>The story") : report.index("<h2>Stages")]


def test_the_story_has_curves_side_by_side_strategies_and_what_tokens_are_worth(report):
    titles = re.findall(r"<figcaption>(.*?)(?: <small>|</figcaption>)", story_of(report))
    assert titles == [
        *("Accuracy", "Response length", "Reflection", "Entropy"),
        *("Strategies while grpo trains", "Strategies while zero trains", "pass@1 by allowed tokens"),
    ]
    told = re.findall(r'role="img" aria-label="(.*?)"', story_of(report))
    assert told[0].startswith("Accuracy, %: grpo from 30.0 to 77.3; zero from "), "from step 0 on"
    assert "grpo, level 4 from 10.0 to 19.5" in told[0]
    assert "Pass@1 on held-out problems rises from 31.0 % (base) to 80.0 % (all_scenario)." in report


def test_one_problem_is_answered_along_the_way_and_what_the_answer_mends_is_marked(report):
    part = story_of(report)
    heads = [head.split(" <span")[0].strip() for head in re.findall(r"<h4>(.*?)</h4>", part, re.DOTALL)]
    assert heads == ["base", "cold_start = grpo, step 0", "grpo, step 8", "grpo, step 64"]
    assert part.count(">wrong</span>") == 3 and part.count(">right</span>") == 1
    assert "&lt;12&gt; and 7" in part and "40 tokens; solves 62.0 % of the development problems" in part
    assert '<del><span class="sr">[wrong: </span>12+7=18<span class="sr">]</span></del>' in part
    assert '<ins><span class="sr">[corrected: </span>12+7=19<span class="sr">]</span></ins>' in part


def test_the_problem_that_is_shown_is_one_that_was_learned_by_correction():
    def answers(*right: bool, text: str = WRONG) -> list[Said]:
        texts = [WRONG, *[text] * (len(right) - 1)]
        return [
            Said("", {"completion": t, "correct": r, "corrections": corrections(t)}, "")
            for t, r in zip(texts, right, strict=True)
        ]

    ranked = [
        answers(False, False, text=MENDED),
        answers(True, True, text=MENDED),
        answers(False, True),
        answers(False, True, text=MENDED),
    ]
    assert sorted(ranked, key=telling) == ranked


def test_a_running_mean_is_of_those_around_it():
    assert running_mean([1, 2, 3, 4, 5, 6]) == [2, 2.5, 3, 4, 4.5, 5]


def test_pieces_of_a_text_are_the_text():
    parts = marked(MENDED, corrections(MENDED))
    assert "".join(text for _, text in parts) == MENDED
    assert [part for part in parts if part[0]] == [("wrong", "12+7=18"), ("right", "12+7=19")]
    assert marked("", []) == [] and marked("12+7=19", []) == [("", "12+7=19")]


def test_an_older_runs_problem_is_of_its_last_answers(tmp_path):
    for stage in ("base", "cold_start", "grpo"):
        (build(tmp_path, stage) / "dev_evaluations.jsonl").unlink(missing_ok=True)
    part = story_of(write_report(tmp_path).read_text())
    heads = [head.split(" <span")[0].strip() for head in re.findall(r"<h4>(.*?)</h4>", part, re.DOTALL)]
    assert heads == ["base", "cold_start", "grpo"]


# --- report


def test_the_report_is_one_file_without_network(report, reproduction):
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"', "", report)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)|@import|url\((?!#)|<script""", without_names)
    assert (reproduction / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_shows_all_stages_and_where_they_come_from(report):
    headings = re.findall(r"<h2>(.*?)</h2>", report)
    assert headings == [
        *("The story", "Stages", "Training", "By task, language and kind", "Reward models"),
        *("The same prompt after every stage", "What rejection sampling kept", "Time and cost"),
        *("How it was made", "Lineage"),
    ]
    for text in (
        "79.0",
        "77.0–81.0",
        "2,960 kept",
        "1,104 dropped",
        "seeds 0 and 1",
        "core-hours",
        "c0c0c0c0",
    ):
        assert text in report
    assert report.index(">controls<") > report.index(">all_scenario<")


def test_samples_stand_side_by_side_and_are_escaped(report):
    part = report[
        report.index("<h2>The same prompt after") : report.index("<h2>What rejection sampling kept")
    ]
    assert part.count("<article") == 2 * len(STAGES + CONTROLS), (
        "two prompts, one cell per stage of the first seed"
    )
    assert "&lt;grpo&gt;" in part and "<grpo>" not in part and "小明有3个苹果" in part
    assert part.count(">right<") and part.count(">wrong<") and part.count(">cut off<")


def test_charts_are_valid_svg_in_the_pages_colours(report):
    charts = re.findall(r"<svg.*?</svg>", report, flags=re.DOTALL)
    assert len(charts) >= 20
    for chart in charts:
        ET.fromstring(chart)
        assert "var(--" in chart and not re.search(r"#00001\d|#00000[1-4]\b", chart)


def test_the_report_works_with_almost_nothing(tmp_path):
    folder = build(tmp_path, "grpo")
    for name in ("dev_evaluations.jsonl", "samples.json", "metrics.jsonl", "evaluation.json", "env.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "checkpoints")
    record = json.loads((folder / "record.json").read_text())
    poor = {key: record[key] for key in ("stage", "pipeline", "created", "checkpoint", "checkpoint_hash")}
    write_json(folder / "record.json", poor)
    page = write_report(tmp_path).read_text()
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Stages", "Time and cost", "How it was made", "Lineage"]
    assert "random weights" in page
    assert not (tmp_path / "curves.png").exists()


def test_broken_lines_and_files_leave_the_rest(tmp_path):
    folder = build(tmp_path, "rejection_sft")
    (folder / "samples.json").write_text('[{"prompt_id": "a"')
    write_json(folder / "data" / "funnel.json", [{"name": "correct"}, "what is this"])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "train/loss": "high"}\n{"step": null}\nnonsense\n')
    page = write_report(tmp_path).read_text()
    assert (
        "The same prompt" not in page
        and "One problem" not in page
        and "supervised stages" in page
        and "correct" in page
    )


def test_nothing_finished_is_said(tmp_path):
    build(tmp_path, "grpo", finished=False)
    with pytest.raises(CheckpointError, match="no finished run"):
        write_report(tmp_path)


def test_cost_counts_cores_and_runs_that_are_not_shown(reproduction):
    chosen = load_runs(reproduction, None, None)
    grpo = next(run for run in chosen if run.stage == "grpo")
    assert grpo.devices == (2, "core") and cost([grpo]) == "0.058 core-hours", "two ranks of one thread"
    others = other_runs(reproduction, chosen)
    assert [run.folder.run_id for run in others] == ["grpo-interrupted"]
    assert others[0].wall_s == 160.0, "the last line's time: it has no record"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["engine=cpu"], {"unit": "core", "count": 2}),
        (["engine=cpu", "engine.threads=0"], {"unit": "core", "count": 6}),
        (["engine=cpu", "engine.accelerator=auto"], {"unit": "GPU", "count": 2}),
        (["engine=gpu"], {"unit": "GPU", "count": 1}),
        (["engine=cluster", "engine.hostfile=HOSTS"], {"unit": "GPU", "count": 16}),
    ],
)
def test_what_a_job_occupies_is_counted_on_all_its_machines(tmp_path, monkeypatch, overrides, expected):
    hosts = tmp_path / "hosts"
    hosts.write_text("# ours\nfirst slots=8\n\nsecond slots=8\n")
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    monkeypatch.setattr(machine, "cores", lambda: 6)
    config = compose(["stage=grpo", *(line.replace("HOSTS", str(hosts)) for line in overrides)]).config
    assert machine.devices(config.engine) == expected


def test_hours_of_gpus_and_of_cores_are_not_added_and_folders_that_are_no_runs_cost_nothing(tmp_path):
    shown = build(tmp_path, "grpo")
    on_gpu = build(tmp_path, "grpo", run_id="tried", finished=False)
    write_json(on_gpu / "env.json", {"devices": {"unit": "GPU", "count": 16}})
    build(tmp_path, "zero", run_id="on-cores", finished=False)
    dry = build(tmp_path, "grpo", run_id="dry", finished=False)
    (dry / "metrics.jsonl").unlink()
    shutil.copytree(shown / "checkpoints" / "step-64", tmp_path / "exported")
    others = other_runs(tmp_path, load_runs(tmp_path, ["grpo-0"], None))
    assert [run.folder.run_id for run in others] == ["on-cores", "tried"]
    assert cost(others) == "0.711 GPU-hours + 0.089 core-hours"
    page = write_report(tmp_path, ["grpo-0"]).read_text()
    assert "made again): 2, 0.711 GPU-hours + 0.089 core-hours" in page


def test_the_report_tells_how_it_was_made(reproduction, report):
    part = report[report.index("<h2>How it was made") :]
    for text in (
        "2026-01-01 10:00 UTC",
        "2 cores",
        "abc1234 with changes",
        "torch 2.13.0",
        "r1pipe ui root=",
    ):
        assert text in part, text
    assert "stage.optim.lr" in part and "0.0003" in part


def test_the_main_settings_are_keys_of_the_config() -> None:
    known = set(leaves())
    assert not [name for name in MAIN_SETTINGS if f"stage.{name}" not in known]
