"""`r1pipe data`: what would be read, shown before anything is trained."""

import contextlib
import io
import json
import re
import runpy
import subprocess
import sys
from dataclasses import replace

import pytest
from test_data_files import composed

from r1pipe.config import script_options
from r1pipe.config.script_options import DataOptions
from r1pipe.core.errors import DataError
from r1pipe.core.paths import stages_dir

SCRIPT_PATH = str(stages_dir() / "data.py")
SCRIPT = runpy.run_path(SCRIPT_PATH)
SUMS = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(30)]


def shown(folder, path, name="files", as_json=True, system=None, **changes):
    """What is printed: an object with `as_json`."""
    data = replace(composed(name, f"data.path={path}"), **changes)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert SCRIPT["main"](DataOptions(data, None, as_json, system)) == 0
    return json.loads(out.getvalue()) if as_json else out.getvalue()


def written(folder, rows, name="rows.jsonl"):
    text = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(text), encoding="utf-8")
    return folder / name


def test_rows_forms_and_samples_are_shown_and_nothing_is_written(tmp_path):
    path = written(tmp_path, [*SUMS, SUMS[0], {"question": "Where?", "answer": "north"}])
    found = shown(tmp_path, path)
    assert found["rows"] == {"reasoning": 32} and found["forms"] == {"number": 31, "text": 1}
    assert found["languages"] == {"en": 32} and sum(found["splits"].values()) == 32
    assert found["exact_repeats"] == 1 and found["set_aside"] == [] and found["refused"] is None
    (source,) = found["sources"]
    assert source["layout"] == "table" and source["columns"] == {"question": "question", "answer": "answer"}
    assert "32 rows of jsonl, layout table (inferred from its columns)" in source["described"]
    assert len(found["samples"]) == 5 and found["samples"][0]["place"] == "rows.jsonl:1"
    assert found["samples"][0]["prompt"].endswith("<｜User｜>What is 0 + 1?<｜Assistant｜>")
    assert found["tokens"]["prompts"]["rows"] == 32 and found["tokens"]["answers"] is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.jsonl"]


def test_what_is_set_aside_is_grouped_with_its_lines(tmp_path):
    bad = [{"question": "What?", "answer": f"\\frac{{{i}}}{{"} for i in range(4)]
    path = written(tmp_path, [*SUMS, *bad, "{"])
    found = shown(tmp_path, path)
    assert found["rows"] == {"reasoning": 30}
    unparsed, damaged = found["set_aside"]
    assert unparsed["rows"] == 4 and unparsed["lines"] == [31, 32, 33]
    assert unparsed["reason"].startswith("the gold answer") and "does not parse" in unparsed["reason"]
    assert damaged["rows"] == 1 and damaged["lines"] == [35] and damaged["reason"].startswith("is not JSON")
    assert "line 31: the gold answer" in found["refused"], "data.bad_rows=refuse"
    changed = {"bad_rows": "set_aside", "max_bad_rows": 0.5}
    assert shown(tmp_path, path, **changed)["refused"] is None


def test_pairs_are_shown_with_both_answers(tmp_path):
    rows = [{"prompt": f"Why {i}?", "chosen": "Yes.", "rejected": "No." if i else "Yes."} for i in range(9)]
    found = shown(tmp_path, written(tmp_path, rows))
    assert found["rows"] == {"preferences": 8} and found["forms"] == {}
    assert found["set_aside"][0]["rows"] == 1 and "the same" in found["set_aside"][0]["reason"]
    assert (found["samples"][0]["chosen"], found["samples"][0]["rejected"]) == ("Yes.", "No.")
    assert found["refused"] is None, "equal pairs are no bad rows"


def test_earlier_turns_are_shown_as_the_model_reads_them(tmp_path):
    said = [
        ("system", "Be brief."),
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Why?"),
        ("assistant", "So."),
    ]
    found = shown(tmp_path, written(tmp_path, [{"messages": [{"role": r, "content": c} for r, c in said]}]))
    (sample,) = found["samples"]
    assert found["with_context"] == 1 and sample["response"] == "So."
    assert "Be brief." in sample["prompt"] and "<｜Assistant｜>Hello" in sample["prompt"]
    assert sample["prompt"].endswith("<｜User｜>Why?<｜Assistant｜>")
    found = shown(tmp_path, written(tmp_path, SUMS), system="Think first.")
    assert "Think first.<｜User｜>What is 0 + 1?" in found["samples"][0]["prompt"], "chat.system"


def test_without_a_terminal_each_fact_is_one_plain_line(tmp_path):
    rows = [*SUMS, {"question": "Who\x1b[31m?" + " and" * 400, "answer": "Nelson", "aliases": ["Horatio"]}]
    out = shown(tmp_path, written(tmp_path, rows[::-1]), as_json=False)
    assert "\x1b" not in out
    for line in (
        "rows             reasoning 31",
        "forms            number 30, text 1",
        "with alternatives 1",
    ):
        assert f"\n{line}" in out, out
    assert "tokens, prompts  of 31: median" in out and "characters…]" in out
    assert "--- rows.jsonl:1  reasoning," in out and "alternatives=" in out


def test_a_description_in_the_config_shows_all_its_sources(tmp_path, shared):
    for name in ("gsm8k_train.jsonl", "gsm8k_test.jsonl"):
        lines = (shared / name).read_text(encoding="utf-8").splitlines()[:20]
        written(tmp_path, lines, name)
    out = shown(tmp_path, tmp_path, "gsm8k", as_json=False)
    assert out.count("columns named in the config: question=question, answer=answer, solution=answer") == 2
    assert "rows             reasoning 40" in out and "test 20" in out


@pytest.mark.parametrize(
    "rows, told",
    [
        (["{"], "rows.jsonl line 1 is not JSON"),
        ([{"a": "1"}], "its columns (a) are no known layout"),
        ([{"question": "What?", "answer": "see solution"}], "rows.jsonl line 1: the gold answer"),
        ([""], "rows.jsonl is empty"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line_and_exit_code_2(tmp_path, rows, told):
    with pytest.raises(DataError, match=re.escape(told)) as caught:
        shown(tmp_path, written(tmp_path, rows))
    assert "\n" not in str(caught.value)


def test_the_script_ends_with_exit_code_2_and_loads_no_torch(tmp_path):
    options = DataOptions(composed("files", f"data.path={tmp_path / 'nowhere.jsonl'}"), None, False)
    script_options.write(options, tmp_path / "options.json")
    program = "import runpy, sys, atexit\n"
    program += "atexit.register(lambda: print({'torch', 'deepspeed', 'datasets'} & sys.modules.keys()))\n"
    program += "runpy.run_path(sys.argv[0], run_name='__main__')"
    program = f"import sys; sys.argv = {[SCRIPT_PATH, str(tmp_path / 'options.json')]}\n{program}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "set()\n")
    assert "nowhere.jsonl does not exist; set data.path=FILE" in done.stderr and done.stderr.count("\n") == 1
