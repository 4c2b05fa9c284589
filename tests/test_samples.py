"""`r1pipe samples`: which rows it shows of a run's rollouts, and how it answers a mistake."""

import io
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from fakes import House
from rich.console import Console
from runfolders import samples as held_out
from tiny_runs import tiny_run

from r1pipe.cli.rollouts import Found, Query, bound, look, numbers, odd_rows, schema_of
from r1pipe.cli.samples import as_row, samples
from r1pipe.train.rl.rows import write_rows

MUCH = 0.7


def row(reward: float | None, advantage: float, text: str = "<think>\nso\n</think>\n\n4", **changes) -> dict:
    """A row as `rows_of` makes it, right and well formed."""
    return {
        "prompt_id": "word-1", "task": "word", "language": "en", "question": "Tom has 2 and 2.\nHow many?",
        "answer": "4", "completion": text, "length": 7, "truncated": False, "repetition": 0.1,
        "strategy": None,
        "reward": reward, "advantage": advantage, "has_variance": True, "trained": True, "entropy": 0.4,
        "scores": {"accuracy": 1.0, "format": 1.0, "language": 1.0}, "failed": [],
    } | changes  # fmt: skip


WRONG = {"accuracy": 0.0, "format": 1.0, "language": 1.0}
STEPS = {
    1: [row(1.2, 1.0), row(0.2, -1.0, "wait, 5", scores=WRONG), row(1.1, 0.0)],
    2: [
        row(1.2, 1.5, "looped " * 9, repetition=0.9),
        row(1.1, 0.5, "4", scores={"accuracy": 1.0, "format": 0.0, "language": 0.2}),
        row(0.3, -1.5, "4!"),
        row(
            None,
            0.0,
            "def f(: (2+2)",
            scores={"format": 1.0},
            failed=["accuracy: infrastructure_failed (OOM)"],
        ),
        row(0.2, 0.4, "never en", truncated=True, scores=WRONG),
    ],
    12: [
        row(1.0, 0.7, "[bold]四[/bold]", scores={**WRONG, "helpful": 0.5}),
        row(0.1, -0.7, "5", scores=WRONG),
    ],
}


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A run that is still going on: rollouts, and no record."""
    folder = tiny_run(tmp_path / "runs" / "grpo-s0-1", "stage=grpo", "pipeline=laptop-s0")
    for step, rows in STEPS.items():
        write_rows(rows, folder / "rollouts" / f"step-{step}.parquet")
    return folder


def ask(house: House, capsys: pytest.CaptureFixture, *words: str) -> list[dict]:
    capsys.readouterr()
    assert house.call("samples", *words, "--json") == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def told(rows: list[dict], kind: str) -> list[tuple]:
    return [(row["step"], row["completion"]) for row in rows if row["kind"] == kind]


def test_best_worst_and_odd_each_once_and_why(house, made, capsys):
    rows = ask(house, capsys, "grpo", "--limit", "2")
    assert told(rows, "best") == [(2, STEPS[2][0]["completion"]), (1, STEPS[1][0]["completion"])]
    assert told(rows, "worst") == [(12, "5"), (1, "wait, 5")]
    assert told(rows, "odd") == [(2, "def f(: (2+2)"), (2, "never en")]
    odd = {row["completion"]: row["odd"] for row in ask(house, capsys, "grpo", "--limit", "9")}
    assert odd["looped " * 9] == ["rewarded though it repeats itself"], "told of the best ones too"
    assert odd["never en"] == ["rewarded though cut off"]
    assert odd["4"] == ["rewarded though badly formed", "rewarded though in another language"]
    assert odd["4!"] == ["punished though right"]
    assert odd["def f(: (2+2)"] == ["not judged"]
    assert odd["wait, 5"] == [] and len(odd) == 9
    assert len(ask(house, capsys, "grpo", "--limit", "9")) == 10


def test_a_row_of_json_has_all_that_the_file_has(house, made, capsys):
    [found] = ask(house, capsys, "grpo", "--text", "DEF F")
    expected = {key: value for key, value in STEPS[2][3].items() if key != "has_variance"}
    expected |= {
        "run": "grpo-s0-1",
        "kind": "odd",
        "odd": ["not judged"],
        "step": 2,
        "source": None,
        "licence": None,
    }
    assert found == expected | {"failed": "accuracy: infrastructure_failed (OOM)"}


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["--step", "2"], {2}),
        (["--step", "2-20"], {2, 12}),
        (["--reward", ">=1.2"], {1, 2}),
        (["--reward", ">1.1"], {1, 2}),
        (["--reward", "1.0"], {12}),
        (["--reward", "..0.15"], {12}),
        (["--reward", "<0.2"], {12}),
        (["--reward", "0.25..0.35"], {2}),
        (["--reward", "helpful=0.5"], {12}),
        (["--reward", "accuracy=0", "--reward", "<=0.1"], {12}),
        (["--reward", "language=0..0.5"], {2}),
        (["--text", "四"], {12}),
        (["--text", "WAIT"], {1}),
        (["--text", "(2+2)"], {2}),
        (["--text", "/^wait.*5$/"], {1}),
        (["--text", "How many?", "--step", "1"], {1}),
    ],
)
def test_filters(house, made, capsys, words, steps):
    rows = ask(house, capsys, "grpo", "--limit", "99", *words)
    assert {row["step"] for row in rows} == steps


def test_of_few_rows_half_are_the_best_and_half_the_worst(house, made, capsys):
    found = ask(house, capsys, "grpo", "--step", "1", "--limit", "9")
    assert [(row["kind"], row["reward"]) for row in found] == [("best", 1.2), ("best", 1.1), ("worst", 0.2)]


def test_filters_keep_exactly_what_they_say(house, made, capsys):
    found = ask(house, capsys, "grpo", "--reward", "accuracy=0", "--limit", "99")
    assert sorted(row["completion"] for row in found) == ["5", "[bold]四[/bold]", "never en", "wait, 5"]
    assert all(row["scores"]["accuracy"] == 0 for row in found)
    assert ask(house, capsys, "grpo", "--reward", ">99") == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--step", "7"], "no step 7: grpo-s0-1 has rollouts of steps 1-12"),
        (["--step", "20-30"], "no steps 20-30: grpo-s0-1 has rollouts of"),
        (["--step", "one"], "--step one is neither a step nor a range of steps; write 7 or 10-20"),
        (["--step", "9-3"], "write 3-9"),
        (["--reward", "high"], "--reward high is not a bound; write '>=1'"),
        (["--reward", ".."], "is not a bound"),
        (["--reward", ">1..2"], "is not a bound"),
        (["--reward", "1.2.3"], "is not a bound"),
        (["--reward", "acuracy=0"], "there is no such reward; did you mean accuracy?"),
        (["--text", "/(/"], "--text /(/ is not a regular expression"),
        (["--limit", "0"], "'--limit'"),
        (["stage.nonsense=1"], "nonsense"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(house, made, capsys, words, message):
    assert house.call("samples", "grpo", *words) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and not out


@pytest.mark.parametrize("how", ["cut off", "empty", "garbage"])
def test_a_file_that_a_kill_cut_off_is_named_and_can_be_left_out(house, made, capsys, how):
    path = made / "rollouts" / "step-2.parquet"
    content = path.read_bytes()
    garbage = content[:20] + bytes(len(content) - 420) + content[-400:]  # with a whole footer
    path.write_bytes({"cut off": content[:-40], "empty": b"", "garbage": garbage}[how])
    assert house.call("samples", "grpo") == 2
    err = capsys.readouterr().err
    assert "step-2.parquet cannot be read" in err and "--step" in err and err.count("\n") == 1
    assert {row["step"] for row in ask(house, capsys, "grpo", "--step", "3-12")} == {12}


def test_a_kill_while_a_step_is_written_leaves_no_file_that_cannot_be_read(tmp_path, monkeypatch):
    def killed(table, path, **options):
        Path(path).write_bytes(b"PAR1")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pq, "write_table", killed)
        write_rows(STEPS[1], tmp_path / "rollouts" / "step-1.parquet")
    assert not list((tmp_path / "rollouts").glob("*.parquet"))


def test_columns_have_their_types_even_where_all_is_null(tmp_path):
    write_rows(STEPS[1], tmp_path / "rollouts" / "step-1.parquet")
    schema = pq.read_schema(tmp_path / "rollouts" / "step-1.parquet")
    assert schema.field("failed").type == schema.field("strategy").type == pa.string()


def test_files_of_older_versions_are_read(tmp_path):
    """Columns of nulls had no type, there was no repetition, and what did not apply was NaN."""
    old = {
        "question": "?",
        "completion": "so",
        "reward": 1.0,
        "advantage": 1.0,
        "truncated": True,
        "failed": None,
    }
    path = tmp_path / "step-1.parquet"
    pq.write_table(pa.Table.from_pylist([old | {"score_accuracy": float("nan"), "score_format": 0.0}]), path)
    [(kind, _, odd)] = look({1: path}, Query.of([], None, None, 3), MUCH).rows
    assert (kind, odd) == ("best", ["rewarded though cut off", "rewarded though badly formed"])
    assert not look({1: path}, Query.of(["accuracy<=1"], None, None, 3), MUCH).rows


def of_kind(found: Found, kind: str) -> list[dict]:
    return [row for its_kind, row, _ in found.rows if its_kind == kind]


def test_many_steps_are_read_by_their_numbers_alone(tmp_path):
    files = {step: tmp_path / f"step-{step}.parquet" for step in range(1, 41)}
    for step, path in files.items():
        write_rows([row(step / 100, 1.0), row(-step / 100, -1.0, truncated=True)], path)
    found = look(files, Query.of([], None, None, 2), MUCH)
    assert [(one["step"], one["reward"]) for one in of_kind(found, "best")] == [(40, 0.4), (39, 0.39)]
    assert [one["step"] for one in of_kind(found, "worst")] == [40, 39]
    assert found.counts["read"] == found.counts["matching"] == 80
    for text in (None, "so"):
        query = Query.of([], text, None, 2)
        table = numbers(ds.dataset(files[1], schema_of(["accuracy"])), 1, query.text, odd_rows(MUCH))
        assert len(table) == 2 and not {*table.column_names} & {"completion", "question", "answer"}
    found = look(files, Query.of([">=0.39"], "so", None, 2), MUCH)
    assert [row["step"] for _, row, _ in found.rows] == [40, 39] and found.counts["matching"] == 2


def test_bounds_allow_for_the_rounding_of_sums():
    table = pa.table({"reward": [0.1 + 0.2, 0.3 - 1e-3]})
    for words, kept in ((">=0.3", 1), ("0.3", 1), (">0.3", 0), ("<0.3", 1), ("0.2..0.3", 2), ("-1..", 2)):
        assert len(table.filter(bound(words)[1])) == kept, words


# --- which run


def test_a_run_is_an_id_a_path_or_a_stage_whose_newest_run_has_something_to_show(house, made, capsys):
    assert ask(house, capsys, "grpo-s0-1", "--limit", "1")[0]["run"] == "grpo-s0-1"
    assert ask(house, capsys, str(made), "--limit", "1")[0]["run"] == "grpo-s0-1"
    newer = tiny_run(made.with_name("grpo-s0-2"), "stage=grpo", "pipeline=laptop-s0")
    assert ask(house, capsys, "grpo", "--limit", "1")[0]["run"] == "grpo-s0-1", "the newer one is a dry run"
    write_rows(STEPS[1], newer / "rollouts" / "step-1.parquet")
    os.utime(newer / "config.json", (2e9, 2e9))
    assert ask(house, capsys, "grpo", "--limit", "1")[0]["run"] == "grpo-s0-2"
    other = tiny_run(made.with_name("grpo-s1-1"), "stage=grpo", "pipeline=laptop-s1")
    write_rows(STEPS[1], other / "rollouts" / "step-1.parquet")
    assert ask(house, capsys, "grpo", "seed=1", "--limit", "1")[0]["run"] == "grpo-s1-1"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("grpo-s0-9", "did you mean grpo-s0-1?"),
        ("zero", "stage zero has no run in pipeline laptop-s0 under"),
        ("cold_start", "cold_start-s0-1 has nothing to show yet"),
    ],
)
def test_a_run_that_is_not_there_or_has_nothing(house, made, capsys, name, message):
    tiny_run(made.with_name("cold_start-s0-1"), "stage=cold_start", "pipeline=laptop-s0")
    assert house.call("samples", name) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_a_stage_of_another_pipeline_is_offered(house, made, capsys):
    assert house.call("samples", "grpo", "pipeline=mine") == 2
    assert "other pipelines have one: pipeline=laptop-s0" in capsys.readouterr().err


# --- stages without rollouts


def test_a_stage_without_rollouts_shows_its_held_out_prompts_and_says_so(house, made, capsys):
    folder = tiny_run(made.with_name("cold_start-s0-1"), "stage=cold_start", "pipeline=laptop-s0")
    rows = held_out("cold_start")
    rows[1]["correct"] = True
    (folder / "samples.json").write_text(json.dumps(rows))
    assert house.call("samples", "cold_start") == 0
    out = capsys.readouterr().out
    assert "held-out prompts" in out.splitlines()[0] and "samples.json" in out.splitlines()[0]
    assert (
        out.index("best") < out.index("right") < out.index("小明") < out.index("worst") < out.index("wrong")
    )
    found = ask(house, capsys, "cold_start", "--reward", "accuracy=0")
    assert [(one["kind"], one["prompt_id"]) for one in found] == [("best", "countdown-1")]
    assert [one["prompt_id"] for one in ask(house, capsys, "cold_start", "--text", "/苹果/")] == ["word-2"]
    for words, message in (
        (["--step", "3"], "no step 3: cold_start-s0-1 has no rollouts"),
        (["--reward", "format=0"], "samples.json has accuracy only"),
    ):
        assert house.call("samples", "cold_start", *words) == 2
        assert message in capsys.readouterr().err


def test_the_messages_before_a_question_are_shown(house, made, capsys):
    folder = tiny_run(made.with_name("cold_start-s0-1"), "stage=cold_start", "pipeline=laptop-s0")
    context, rows = [{"role": "system", "content": "Be brief."}], held_out("cold_start")
    (folder / "samples.json").write_text(json.dumps([rows[0] | {"context": context}, *rows[1:]]))
    assert house.call("samples", "cold_start") == 0
    assert "system: Be brief.\nprompt: " in capsys.readouterr().out
    found = {row["prompt_id"]: row.get("context") for row in ask(house, capsys, "cold_start")}
    assert found["countdown-1"] == context and found["word-2"] is None
    row = {"question": "Why?", "context": json.dumps(context)}
    assert as_row(row) == {"question": "Why?", "context": context, "scores": {}}, "as rollouts have it"


def test_a_sample_without_a_verdict_is_shown_as_not_judged(house, made, capsys):
    folder = tiny_run(made.with_name("cold_start-s0-1"), "stage=cold_start", "pipeline=laptop-s0")
    rows = held_out("cold_start")
    rows[0]["correct"] = None
    (folder / "samples.json").write_text(json.dumps(rows))
    found = ask(house, capsys, "cold_start")
    assert [(row["kind"], row["prompt_id"]) for row in found] == [("best", "word-2"), ("odd", "countdown-1")]
    assert found[1]["odd"] == ["not judged"]
    assert house.call("samples", "cold_start") == 0
    assert "not judged" in capsys.readouterr().out


# --- damaged files: what is named is refused in one line, what is listed is skipped in one line


def test_exported_checkpoints_and_damaged_runs_do_not_hide_the_others(house, made, capsys):
    exported = made.with_name("exported")
    exported.mkdir()
    (exported / "config.json").write_text('{"model_type": "deepseek_v3"}')
    damaged = tiny_run(made.with_name("grpo-s0-3"), "stage=grpo", "pipeline=laptop-s0")
    (damaged / "config.json").write_text('{"stage": {"na')
    assert house.call("samples", "grpo", "--json", "--limit", "1") == 0
    out, err = capsys.readouterr()
    assert {json.loads(line)["run"] for line in out.splitlines()} == {"grpo-s0-1"}
    assert err.count("\n") == 1 and "skipped 1 damaged run(s) (grpo-s0-3)" in err
    assert "config.json is not valid JSON" in err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", '{"stage": {"na', "config.json is not valid JSON"),
        ("config.json", '{"stage": {"name": "grpo"}}', "tripwires.wires.repetition.limit is missing"),
        ("samples.json", '[{"prompt_id": "a"', "samples.json cannot be read"),
        ("samples.json", '[{"prompt_id": "a"}]', "samples.json cannot be read"),
    ],
)
def test_a_damaged_file_of_the_run_that_is_named_is_one_line(house, made, capsys, name, content, message):
    run = made
    if name == "samples.json":
        run = tiny_run(made.with_name("cold_start-s0-1"), "stage=cold_start", "pipeline=laptop-s0")
    (run / name).write_text(content)
    assert house.call("samples", str(run)) == 2
    out, err = capsys.readouterr()
    assert message in err and err.count("\n") == 1 and not out


# --- on the screen


def screen(folder: Path, **options) -> str:
    console = Console(file=io.StringIO(), width=80, **options)
    samples(str(folder), [], Query.of([], None, "12", 1), False, console)
    return console.file.getvalue()


def test_the_screen_is_coloured_by_advantage_and_shows_markup_and_escapes_as_text(made):
    write_rows(
        [row(1.0, 0.7, "[red]good\x1b[2J[/red]"), row(0.1, -0.7, "b\u202ead", question="[/] \x07?")],
        made / "rollouts" / "step-12.parquet",
    )
    text = screen(made, force_terminal=True, color_system="standard")
    assert "\x1b[32m[red]good�[2J[/red]" in text and "\x1b[31mb�ad" in text
    assert "[/] �?" in text and "\x1b[2J" not in text and "\x07" not in text


def test_without_a_terminal_lines_are_plain_and_whole(made):
    long = "word " * 100
    write_rows([row(1.0, 0.7, long + "\n" + "x" * 9000)], made / "rollouts" / "step-12.parquet")
    text = screen(made)
    assert "\x1b" not in text and long.strip() in text
    assert "characters left out; --json has all" in text and len(text) < 6000
