"""Data files as people have them: formats told by content, layouts told by columns, and what is set aside."""

import gzip
import io
import json
import os
import shlex
import subprocess
import sys
from dataclasses import asdict

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from forked import LIMIT_S
from test_data_files import composed, config, source

from r1pipe.config.data import LayoutName
from r1pipe.core.errors import ConfigError, DataError
from r1pipe.core.types import Message
from r1pipe.data import open_data
from r1pipe.data.files import EQUAL, Files
from r1pipe.data.layouts import LAYOUTS
from r1pipe.data.reading import read_file, read_rows
from r1pipe.rewards.answers.gold import Form
from r1pipe.runs import data_files

ALL = 10**6
SUMS = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(40)]
ADD = "assert add(1, 2) == 3"


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def zstd(content):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def parquet(rows):
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def arrow(rows, how=pyarrow.ipc.new_stream):
    sink, table = io.BytesIO(), pyarrow.Table.from_pylist(rows)
    with how(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def read(tmp_path, rows, name="rows.jsonl", **changes):
    """The items of a file whose columns nobody names, and the source."""
    (tmp_path / name).write_text(lines(rows), encoding="utf-8")
    listed = changes.pop("kind", "reasoning")
    task = "sums" if listed == "reasoning" else "writing"
    files = Files(config(tmp_path, **{listed: [source(name, **({"columns": {}, "task": task} | changes))]}))
    kind = next(kind for kind, found in files.sources.items() if found)
    return files.items(kind), files


def first(tmp_path, row, **changes):
    items, files = read(tmp_path, [row], **changes)
    return items[0], files


# formats


PLAIN = {
    "jsonl": lines(SUMS).encode(),
    "json": json.dumps(SUMS).encode(),
    "json in an object": json.dumps({"version": 1, "data": SUMS}, indent=1).encode(),
    "json in one line": json.dumps({"version": 1, "data": SUMS}).encode(),
    "csv": b"question,answer\n" + "".join(f"{r['question']},{r['answer']}\n" for r in SUMS).encode(),
    "csv of Excel": b"\xef\xbb\xbfquestion;answer\r\n"
    + "".join(f'"{r["question"]}";{r["answer"]}\r\n' for r in SUMS).encode(),
    "tsv": b"question\tanswer\n" + "".join(f"{r['question']}\t{r['answer']}\n" for r in SUMS).encode(),
    "parquet": parquet(SUMS),
    "arrow": arrow(SUMS),
    "arrow file": arrow(SUMS, pyarrow.ipc.new_file),
}


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd], ids=["plain", "gz", "zst"])
@pytest.mark.parametrize("name", PLAIN)
def test_every_format_plain_or_compressed(tmp_path, name, pack):
    suffix = {"bytes": "", "compress": ".gz", "zstd": ".zst"}[pack.__name__]
    path = tmp_path / f"rows.{name.split()[0]}{suffix}"
    path.write_bytes(pack(PLAIN[name]))
    assert [row.values for row in read_file(path).rows] == SUMS


@pytest.mark.parametrize("name", ["jsonl", "json", "parquet", "arrow"])
@pytest.mark.parametrize(
    "wrong", ["rows.csv", "rows.json", "rows.parquet", "rows.data", "rows", "rows.jsonl.gz"]
)
def test_the_content_wins_over_the_name(tmp_path, name, wrong):
    (tmp_path / wrong).write_bytes(PLAIN[name])
    assert [row.values for row in read_file(tmp_path / wrong).rows] == SUMS
    (tmp_path / wrong).write_bytes(gzip.compress(PLAIN[name]))
    assert len(read_file(tmp_path / wrong).rows) == len(SUMS)


@pytest.mark.parametrize(
    "name, content, told",
    [
        (
            "r.csv",
            b"question,answer,answer\na,1,2\n",
            r"r\.csv line 1 names the column 'answer' twice; rename",
        ),
        ("r.csv", b"question,answer\n", r"r\.csv holds no rows; download"),
        ("r.csv", b"q" * 2_000_000 + b",a\n1,2\n", r"r\.csv line 1 cannot be read \(field larger"),
        ("r.csv", b'a,q\n1,"What?\n2,b\n3,c\n', r"r\.csv line 2 opens a quotation mark that is never closed"),
        ("r.json", b'[{"q": 1}, {"q": NaN}]', r"r\.json is not JSON \(NaN is not a JSON number\); correct"),
        ("r.jsonl", b'{"q": ' + b"[" * 990 + b"]" * 990 + b"}", r"r\.jsonl line 1 is n.*; correct it"),
        ("r.tsv", b"question\tanswer\na\t1\t2\n", r"r\.tsv line 2 cannot be read \(3 fields"),
        ("r.txt", b"What is this?", r"unknown format; give one of \.json.* \.arrow, plain, \.gz or \.zst"),
        ("r.jsonl.zst", zstd(b"x" * 999)[:-4], r"r\.jsonl\.zst cannot be read \("),
        ("r.json.gz", gzip.compress(PLAIN["json"], mtime=0)[:50], r"r\.json\.gz cannot be read \("),
        ("r.arrow", arrow(SUMS)[:200], r"r\.arrow cannot be read \("),
        ("r.parquet", parquet(SUMS)[:-30], r"r\.parquet cannot be read \("),
    ],
)
def test_damaged_files_are_one_line(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=told) as caught:
        found = read_file(tmp_path / name)
        raise DataError(found.bad[0].reason)
    assert "\n" not in str(caught.value)


def test_suffixes_may_be_in_capitals_and_a_limit_beyond_all_fields(tmp_path):
    (tmp_path / "ROWS.CSV").write_bytes(PLAIN["csv"])
    assert [row.values for row in read_file(tmp_path / "ROWS.CSV", 10**30).rows] == SUMS


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "Why?"}]},
        {"question": "Add.", "tests": [{"input": "1 2", "output": "3"}]},
    ],
)
def test_one_row_alone_in_a_file_is_no_list_of_its_parts(tmp_path, row):
    for indent in (None, 1):
        (tmp_path / "row.json").write_text(json.dumps(row, indent=indent))
        assert [each.values for each in read_file(tmp_path / "row.json").rows] == [row]


def test_a_missing_number_is_no_answer(tmp_path):
    (tmp_path / "r.parquet").write_bytes(
        parquet([{"question": f"{i}?", "answer": 1.0 * i} for i in range(3)])
    )
    assert [item.prompt.answer for item in whole(tmp_path / "r.parquet").items("reasoning")] == [
        "0",
        "1",
        "2",
    ]
    (tmp_path / "r.parquet").write_bytes(parquet([{"question": "?", "answer": float("nan")}]))
    with pytest.raises(DataError, match=r"r\.parquet.*(the answer|no known layout)"):
        whole(tmp_path / "r.parquet").items("reasoning")


def test_bad_rows_of_a_folder_are_counted_as_those_of_the_folder(tmp_path):
    rows = [*SUMS, {"question": "What?", "answer": ""}]
    shards_of(tmp_path, **{"a-0": rows[:20], "a-1": rows[20:]})
    said = []
    config = composed("files", f"data.path={tmp_path}", "data.bad_rows=set_aside", "data.max_bad_rows=1")
    open_data(config, 0, report=said.append).prompts("train", ALL, 0)
    assert said[0].startswith(
        f"1 of 41 rows of {tmp_path} set aside; the first: {tmp_path}/a-1.parquet row 21"
    )


def test_a_line_break_in_a_field_keeps_the_line_numbers(tmp_path):
    (tmp_path / "r.csv").write_bytes(b'question,answer\r\n"Two\r\nlines",1\r\nb,2\r\nc,3,4\r\n')
    found = read_file(tmp_path / "r.csv")
    assert [row.number for row in found.rows] == [2, 4] and found.bad[0].number == 5


# folders and the hub


def shards_of(folder, **files):
    """A folder of parquet files by name: their rows."""
    for name, rows in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".parquet").write_bytes(parquet(rows))
    (folder / "README.md").write_text("about")
    return folder


def whole(folder):
    return open_data(composed("files", f"data.path={folder}"), 0)


def questions(data, split):
    return {prompt.question for prompt in data.prompts(split, ALL, 0)}


def test_a_folder_of_shards_is_one_data_set(tmp_path):
    names = {f"train-0000{i}-of-00002": SUMS[20 * i : 20 * i + 20] for i in range(2)}
    data = whole(shards_of(tmp_path, **names))
    found = [questions(data, split) for split in ("train", "dev", "test")]
    assert set.union(*found) == {row["question"] for row in SUMS} and sum(map(len, found)) == 40
    assert len(data.files) == 2 and "40 rows of 2 files of parquet" in data.layouts[0]
    changed = data.hash
    shards_of(tmp_path, **{"train-00001-of-00002": SUMS[21:40]})
    assert whole(tmp_path).hash != changed, "the hash covers every shard"


@pytest.mark.parametrize("form", ["{}", "data__{}-00000-of-00001", "{}__part-0"])
def test_files_and_folders_are_splits_by_their_names(tmp_path, form):
    sizes = {"train": SUMS[:30], "validation": SUMS[30:33], "test": SUMS[33:]}
    data = whole(shards_of(tmp_path, **{form.format(name): rows for name, rows in sizes.items()}))
    assert questions(data, "test") == {row["question"] for row in SUMS[33:]}
    assert questions(data, "dev") == {row["question"] for row in SUMS[30:33]}
    assert questions(data, "train") == {row["question"] for row in SUMS[:30]}


def test_folders_that_save_to_disk_wrote(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    table = datasets.Dataset.from_list(SUMS)
    table.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict(train=table, test=table.select(range(5))).save_to_disk(tmp_path / "two")
    found = read_rows(tmp_path / "one")
    assert [row.values for row in found.rows] == SUMS and found.format == "a folder of save_to_disk"
    assert questions(whole(tmp_path / "two"), "test") == {row["question"] for row in SUMS[:5]}


@pytest.mark.parametrize("damaged", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
def test_a_damaged_folder_of_save_to_disk_is_one_line(tmp_path, damaged):
    import datasets

    datasets.Dataset.from_list(SUMS).save_to_disk(tmp_path / "one")
    (tmp_path / "one" / damaged).write_text("[]")
    with pytest.raises(DataError, match=r"one cannot be read \(.*\); save it again") as caught:
        read_rows(tmp_path / "one")
    assert "\n" not in str(caught.value)


def test_a_downloaded_data_set_of_the_hub_is_read_without_a_network(tmp_path, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    shards_of(tmp_path, main__train=SUMS[:30], main__test=SUMS[30:], socratic__train=SUMS)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    data = whole("open/sums:main")
    assert questions(data, "test") == {row["question"] for row in SUMS[30:]}
    assert (asked["name"], asked["local_files_only"]) == ("open/sums", True)
    assert asked["allow_patterns"][0] == "main/*" and data.files == {}
    with pytest.raises(DataError, match=r"open/sums on the hub has no folder mian; give another"):
        whole("open/sums:mian")
    with pytest.raises(DataError, match=r"several data sets \(main, socratic\)"):
        whole("open/sums")


def test_a_download_that_breaks_off_is_one_line(monkeypatch):
    import huggingface_hub.errors

    def snapshot(name, **options):
        raise huggingface_hub.errors.HTTPError("peer closed connection\n(received 7 bytes)")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr("r1pipe.data.reading._hub_answers", lambda: True)
    with pytest.raises(
        DataError, match=r"open/sums is no path here.*\(peer closed connection .received 7 bytes"
    ):
        whole("open/sums")


def test_the_hash_of_a_hub_name_follows_its_revision(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    group = asdict(composed("files", "data.path=open/sums:main"))
    before = data_files.hashes(group)
    refs = tmp_path / "datasets--open--sums" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("1f2e")
    assert before[1] == {} and list(data_files.hashes(group)[1]) == ["open/sums:main"]
    assert data_files.hashes(group)[0] != before[0] != data_files.hashes(group | {"path": "open/other"})[0]


def test_folders_that_are_no_data_set_say_so(tmp_path):
    with pytest.raises(DataError, match="holds no data files"):
        whole(tmp_path)
    shards_of(tmp_path, main__train=SUMS, socratic__train=SUMS)
    with pytest.raises(DataError, match=r"several data sets \(main, socratic\); give one"):
        whole(tmp_path)
    assert len(read_rows(tmp_path / "main").rows) == 40
    (tmp_path / "main" / "more.csv").write_bytes(PLAIN["csv"])
    with pytest.raises(DataError, match=r"several formats \(\.csv, \.parquet\)"):
        whole(tmp_path / "main")


@pytest.mark.parametrize("variables", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}])
def test_without_a_hub_a_name_is_one_line_within_seconds(tmp_path, variables):
    code = "import sys; from pathlib import Path; from r1pipe.core import terminal; "
    code += (
        "from r1pipe.data.reading import read_rows; terminal.run(lambda: read_rows(Path('open/sums:main')))"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | variables | {"HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "open/sums:main is no path here, and not to be had from the hub (" in done.stderr
    assert "does not answer" in done.stderr, "the client has not gone on trying"


def test_no_path_at_all_is_not_the_working_folder():
    with pytest.raises(ConfigError, match=r"data=files names no file; set data\.path=FILE"):
        open_data(composed("files"), 0)


# problems


@pytest.mark.parametrize(
    "row",
    [
        {"question": "6 * 7?", "answer": "42", "id": 3},
        {"Problem": "6 * 7?", "Answer": 42, "Solution": "It is 42.", "ID": "2024-I-1"},
        {"prompt": [{"role": "user", "content": "6 * 7?"}], "ground_truth": 42.0},
        {"input": "6 * 7?", "target": "42"},
        {"instruction": "6 * 7?", "answer": "42"},
        {"problem": "6 * 7?", "expected_answer": "42", "generated_solution": "..."},
        {
            "problem": "6 * 7?",
            "solution": r"So we have $\boxed{42}$.",
            "messages": [{"role": "user", "content": "?"}],
        },
        {"question": "6 * 7?", "answer": "six times seven\n#### 42"},
        {"question": "6 * 7?", "final_answer": ["42"], "answers": None},
        {"messages": [{"role": "user", "content": "6 * 7?"}], "answer": "42"},
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"content": "6 * 7?", "role": "user"}],
            "ability": "math",
            "reward_model": {"ground_truth": "42", "style": "rule"},
            "extra_info": {"answer": "six times seven", "index": 0, "question": "6 * 7?", "split": "train"},
        },
    ],
    ids=lambda row: "+".join(row),
)
def test_a_problem_with_its_answer(tmp_path, row):
    item, _ = first(tmp_path, row)
    assert (item.prompt.question, item.prompt.answer) == ("6 * 7?", "42")
    assert item.prompt.context == () and item.prompt.checker == {}


def test_a_worked_solution_is_kept_beside_its_answer(tmp_path):
    item, files = first(tmp_path, {"question": "6 * 7?", "answer": "six <<6*7=42>>times seven\n#### 42"})
    assert item.texts["solution"] == "six times seven"
    assert files.sources["reasoning"][0].answer_after == "####"
    item, _ = first(tmp_path, {"problem": "?", "solution": r"First.\boxed{42}"})
    assert item.texts["solution"] == r"First.\boxed{42}" and item.prompt.answer == "42"


def test_the_passage_comes_before_the_question(tmp_path):
    item, _ = first(
        tmp_path, {"Body": "Ann has 3.", "Question": "And one more?", "Answer": 4.0, "Type": "sum"}
    )
    assert item.prompt.question == "Ann has 3.\nAnd one more?"


@pytest.mark.parametrize(
    "answer, others",
    [
        (["Nelson", "Horatio Nelson"], ["Horatio Nelson"]),
        (
            {"value": "Nelson", "aliases": ["Nelson", "Lord Nelson"], "type": "WikipediaEntity"},
            ["Lord Nelson"],
        ),
        ({"text": ["Nelson", "Nelson", "Admiral Nelson"], "answer_start": [1, 1, 5]}, ["Admiral Nelson"]),
        ('["Nelson", "Horatio Nelson"]', ["Horatio Nelson"]),
        (["Nelson", "a sentence " * 20], []),
    ],
)
def test_further_right_answers_are_alternatives(tmp_path, answer, others):
    item, _ = first(tmp_path, {"question": "Who?", "answer": answer})
    assert item.prompt.answer == "Nelson"
    assert item.prompt.checker == ({"alternatives": others} if others else {})


def test_a_column_of_aliases_and_one_of_forms(tmp_path):
    item, _ = first(
        tmp_path, {"question": "Who?", "answer": "12", "aliases": ["a dozen"], "answer_type": "text"}
    )
    assert item.prompt.checker == {"alternatives": ["a dozen"], "answer_form": "text"}
    item, _ = first(tmp_path, {"question": "Who?", "answer": "12", "answer_type": "Integer"})
    assert item.prompt.checker == {}, "not a name of one of our forms"
    item, _ = first(tmp_path, {"question": "Who?", "answer": "12"}, answer_form="number")
    assert item.prompt.checker == {"answer_form": "number"}
    with pytest.raises(ConfigError, match=r"answer_form=nubmer is unknown; did you mean number\?"):
        first(tmp_path, SUMS[0], answer_form="nubmer")


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Capital?", "subject": "geography", "choices": ["Rome", "Paris"], "answer": 1},
        {
            "question": "Capital?",
            "choices": {"text": ["Rome", "Paris"], "label": ["A", "B"]},
            "answerKey": "B",
        },
        {
            "question": "Capital?",
            "choices": {"text": ["Rome", "Paris"], "label": ["1", "2"]},
            "answerKey": "2",
        },
        {"question": "Capital?", "A": "Rome", "B": "Paris", "answer": "B"},
        {
            "question": "Capital?",
            "options": {"A": "Rome", "B": "Paris"},
            "answer": "Paris",
            "answer_idx": "B",
        },
        {"question": "Capital?", "options": ["A) Rome", "B) Paris"], "answer": "B. Paris"},
        {"question": "Capital?", "options": "['Rome', 'Paris']", "answer": "paris"},
        {"question": "Capital?", "answers": ["Rome", "Paris"], "label": 1},
        {"query": "Capital?", "choices": ["(A)Rome", "(B)Paris"], "gold": [1]},
        {
            "question_stem": "Capital?",
            "choices": {"label": ["A", "B"], "text": ["Rome", "Paris"]},
            "answerKey": "(B)",
        },
    ],
    ids=lambda row: "+".join(row),
)
def test_the_right_option_is_a_letter(tmp_path, row):
    item, _ = first(tmp_path, row)
    assert item.prompt.question == "Capital?\nA. Rome\nB. Paris" and item.prompt.answer == "B"
    assert item.prompt.checker == {"options": {"A": "Rome", "B": "Paris"}, "answer_form": "choice"}


def test_an_empty_column_of_an_option_shifts_no_other(tmp_path):
    row = {"question": "Capital?", "A": "Rome", "B": "Bonn", "C": "Paris", "D": "Oslo", "answer": "C"}
    by_index = {**row, "question": "And then?", "B": "", "answer": 2}
    items, _ = read(tmp_path, [row, {**row, "question": "And now?", "B": ""}, by_index])
    checkers = [(item.prompt.answer, item.prompt.checker["options"]) for item in items]
    assert [options[letter] for letter, options in checkers] == ["Paris", "Paris", "Paris"]
    item, _ = first(tmp_path, {**row, "A": "B", "answer": "B"})
    assert item.prompt.answer == "B", "a column of its own is surely a label"


def test_a_question_that_shows_its_options_keeps_its_text(tmp_path):
    asked = "Capital?\n(A) Rome\n(B) Paris"
    item, _ = first(tmp_path, {"question": asked, "options": ["Rome", "Paris"], "answer": "A"})
    assert item.prompt.question == asked


@pytest.mark.parametrize(
    "options, answer, told",
    [
        (["Rome", "Paris"], 2, "'2' .column answer. is no index of 2 options, counted from 0; write letters"),
        (["1", "2", "3"], "2", "one option's text and another's index; write its letter"),
        (["AB", "A", "B", "O"], "A", "one option's letter and another's text; give the options as"),
        ({"A": "Rome", "B": "", "C": "Paris"}, 3, "is no index of 2 options"),
        (["Rome", "Paris"], "London", "none of the options' letters, indices and texts"),
        (["Rome", "Paris"], "C", "none of the options' letters"),
        (["Rome"], "A", "holds no list of options"),
        (["Rome", None, "Paris"], 2, "an option that is no text"),
        (["Rome", {"x": 1}], "A", "an option that is no text"),
        (["Rome", "Paris"], None, "the answer .column answer. is empty"),
    ],
)
def test_an_option_that_is_not_told_is_refused(tmp_path, options, answer, told):
    good = {"question": "Capital?", "options": ["Rome", "Paris"], "answer": "A"}
    with pytest.raises(DataError, match=rf"rows\.jsonl line 2:.*{told}"):
        read(tmp_path, [good, {**good, "options": options, "answer": answer}])


# code


@pytest.mark.parametrize(
    "row",
    [
        {
            "task_id": "x/0",
            "prompt": "def add(a, b):\n",
            "canonical_solution": "",
            "test": f"def check(add):\n    {ADD}",
            "entry_point": "add",
        },
        {
            "task_id": 11,
            "text": "Add two numbers.",
            "code": "def add(a, b): return a + b",
            "test_list": [ADD],
            "test_setup_code": "",
            "challenge_test_list": [],
        },
        {"question": "Add two numbers.", "tests": [[[1, 2], 3]], "entry_point": "add"},
    ],
    ids=["humaneval", "mbpp", "own"],
)
def test_code_tasks(tmp_path, row):
    item, files = first(tmp_path, row)
    assert files.sources["reasoning"][0].layout == "code"
    assert item.prompt.checker["entry_point"] == "add" and item.prompt.checker["tests"]
    assert "add" in item.prompt.question.lower() and item.prompt.answer == ""


def verl(truth, **more):
    """A row as verl's preprocessing writes it."""
    prompt = [{"role": "system", "content": "Think."}, {"role": "user", "content": "Add two numbers."}]
    model = {"ground_truth": truth, "style": "rule"}
    return {"data_source": "x", "prompt": prompt, "reward_model": model, "extra_info": {"index": 0}, **more}


@pytest.mark.parametrize("pack", [json.dumps, lambda cases: cases], ids=["JSON", "struct"])
def test_verl_rows_of_code(tmp_path, pack):
    item, files = first(
        tmp_path, verl(pack({"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}), ability="code")
    )
    assert files.sources["reasoning"][0].layout == "verl"
    assert item.prompt.checker["tests"] == [["1 2\n", "3\n"], ["3 4\n", "7\n"]]
    assert (item.prompt.question, item.prompt.context) == ("Add two numbers.", (Message("system", "Think."),))


@pytest.mark.parametrize("truth", ['["3", "three"]', ["3", "three"], {"target": ["3", "three"]}])
def test_verl_rows_with_alternatives_in_parquet(tmp_path, truth):
    (tmp_path / "rows.parquet").write_bytes(parquet([verl(truth), verl(truth)]))
    data = open_data(composed("files", f"data.path={tmp_path / 'rows.parquet'}"), 0)
    item = data.items("reasoning")[0]
    assert (item.prompt.answer, item.prompt.checker) == ("3", {"alternatives": ["three"]})


def test_a_list_of_texts_as_ground_truth_is_no_code(tmp_path):
    item, _ = first(tmp_path, {"problem": "Who?", "ground_truth": ["Nelson", "Lord Nelson"]})
    assert item.prompt.checker == {"alternatives": ["Lord Nelson"]}


def test_code_rows_without_tests_are_told_by_line(tmp_path):
    rows = [
        {"question": "Add.", "tests": [[[1, 2], 3]], "entry_point": "add"},
        {"question": "Add.", "tests": []},
    ]
    with pytest.raises(DataError, match=r"rows\.jsonl line 2: it has no tests"):
        read(tmp_path, rows)


# conversations


def turns(*said, keys=("role", "content"), names=("user", "assistant")):
    return [{keys[0]: names[i % 2], keys[1]: text} for i, text in enumerate(said)]


SHAREGPT = {"keys": ("from", "value"), "names": ("human", "gpt")}
EARLIER = (Message("user", "Hi"), Message("assistant", "Hello"))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": turns("Hi", "Hello", "Why?", "Because.")},
        {"conversations": turns("Hi", "Hello", "Why?", "Because.", **SHAREGPT), "id": "a"},
        {"messages": json.dumps(turns("Hi", "Hello", "Why?", "Because."))},
        {
            "prompt": turns("Hi", "Hello", "Why?"),
            "completion": [{"role": "assistant", "content": "Because."}],
        },
        {"instruction": "Why?", "input": "", "output": "Because.", "history": [["Hi", "Hello"]]},
        {"messages": turns("Hi", "Hello", [{"type": "text", "text": "Why?"}], "Because.")},
    ],
    ids=["messages", "sharegpt", "JSON in a column", "prompt and completion", "alpaca", "parts"],
)
def test_the_last_answer_is_learned_and_earlier_turns_are_context(tmp_path, row):
    item, files = first(tmp_path, row)
    assert [kind for kind, found in files.sources.items() if found] == ["general"]
    assert (item.prompt.question, item.texts["response"]) == ("Why?", "Because.")
    assert item.prompt.context == EARLIER and item.prompt.task == "writing"
    (made,) = files.general_demonstrations(1, 0, {}) or files.general_prompts(item.split, 1, 0, {})
    assert getattr(made, "prompt", made) == item.prompt


def test_system_turns_and_columns_come_first(tmp_path):
    system = Message("system", "Be brief.")
    told = [{"role": "system", "content": "Be brief."}, *turns("Why?", "Because.")]
    by_turn, _ = first(tmp_path, {"messages": told})
    by_column, _ = first(tmp_path, {"conversations": turns("Why?", "Because."), "system": "Be brief."})
    twice, _ = first(tmp_path, {"messages": told, "system": "Be brief."})
    assert (
        twice.prompt == by_turn.prompt
        and by_turn.prompt == by_column.prompt
        and by_turn.prompt.context == (system,)
    )
    bare, _ = first(tmp_path, {"messages": turns("Why?", "Because.")})
    assert bare.prompt.id != by_turn.prompt.id


def test_a_conversation_that_ends_with_the_user_is_a_prompt_alone(tmp_path):
    rows = [{"messages": turns(f"Question {i}?", *(["Answer."] if i % 2 else []))} for i in range(100)]
    items, files = read(tmp_path, rows, split="train")
    assert len(items) == 100 and len(files.general_demonstrations(ALL, 0, {})) == 50
    assert len(files.general_prompts("train", ALL, 0, {})) == 100


@pytest.mark.parametrize(
    "said, told",
    [
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "a turn that is not text"),
        ([{"role": "narrator", "content": "Once."}], "a turn of 'narrator'; known: system, developer, user"),
        ([{"role": "assistant", "content": "Hello"}], "it has no user turn"),
        (
            [*turns("Hi"), {"role": "tool", "content": "7"}, {"role": "assistant", "content": "7."}],
            "follows a tool",
        ),
        (
            [*turns("Hi", "Hello"), {"role": "tool", "content": "7"}, *turns("7", "And?", "Fine.")[1:]],
            "tool turn",
        ),
        ([{"speaker": "x"}], "neither text nor turns"),
        (json.dumps(turns("\ud800", "Hello")), "half a character"),
    ],
)
def test_a_conversation_that_cannot_be_learned_is_told_by_line(tmp_path, said, told):
    with pytest.raises(DataError, match=rf"rows\.jsonl line 2: .*{told}"):
        read(tmp_path, [{"messages": turns("Hi", "Hello")}, {"messages": said}])


def test_an_instruction_with_its_input_is_no_problem(tmp_path):
    item, files = first(tmp_path, {"instruction": "Translate.", "input": "Hello", "output": "Hallo"})
    assert files.sources["general"][0].layout == "alpaca"
    assert item.prompt.question == "Translate.\nHello" and item.texts["response"] == "Hallo"


def test_problems_can_be_learned_as_instructions(tmp_path):
    item, files = first(tmp_path, SUMS[1], kind="general")
    assert item.texts["response"] == "2" and files.sources["general"][0].layout == "instructions"


# preferences


HH = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant: "


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": turns("Hi", "Hello", "Why?", "Yes."), "rejected": turns("Hi", "Hello", "Why?", "No.")},
        {
            "prompt": "Why?",
            "chosen": turns("Hi", "Hello", "Why?", "Yes."),
            "rejected": turns("Hi", "Hello", "Why?", "No."),
            "messages": turns("Hi", "Hello", "Why?", "Yes."),
            "score_chosen": 9.0,
            "score_rejected": 1.0,
        },
        {"chosen": HH + "Yes.", "rejected": HH + "No."},
        {
            "prompt": turns("Hi", "Hello", "Why?"),
            "chosen": turns("Yes.", names=("assistant",) * 2),
            "rejected": turns("No.", names=("assistant",) * 2),
        },
        {
            "conversations": turns("Hi", "Hello", "Why?", **SHAREGPT),
            "chosen": {"from": "gpt", "value": "Yes."},
            "rejected": {"from": "gpt", "value": "No."},
        },
    ],
    ids=["messages", "ultrafeedback", "hh", "TRL", "sharegpt"],
)
def test_a_pair_that_repeats_its_prompt_is_two_answers(tmp_path, row):
    item, files = first(tmp_path, row)
    assert files.sources["preferences"] and item.prompt.context == EARLIER
    assert item.texts == {"question": "Why?", "chosen": "Yes.", "rejected": "No."}


def test_texts_that_repeat_the_prompt_lose_it(tmp_path):
    row = {"prompt": "Why?", "chosen": "Why? Yes.", "rejected": "Why?\nNo.", "system": "Be brief."}
    item, _ = first(tmp_path, row)
    assert item.texts == {"question": "Why?", "chosen": "Yes.", "rejected": "No."}
    assert item.prompt.context == (Message("system", "Be brief."),)


def test_named_columns_lose_a_repeated_prompt_too(tmp_path):
    row = {"p": "Why?", "yes": turns("Why?", "Yes."), "no": turns("Why?", "No.")}
    (tmp_path / "r.jsonl").write_text(lines([row]))
    columns = {"question": "p", "chosen": "yes", "rejected": "no"}
    data = Files(
        config(tmp_path, preferences=[source("r.jsonl", task="writing", columns=columns, split="train")])
    )
    (pair,) = data.preference_pairs("train", 1, 0)
    assert (pair.prompt.question, pair.chosen, pair.rejected) == ("Why?", "Yes.", "No.")


def test_an_answer_that_begins_like_its_question_by_chance_stays_whole(tmp_path):
    chance = {"prompt": "Hello", "chosen": "Hello! How are you?", "rejected": "Hello there, go away."}
    rows = [chance, *({"prompt": f"Why {i}?", "chosen": "Yes.", "rejected": "No."} for i in range(3))]
    items, _ = read(tmp_path, rows)
    assert items[0].texts["chosen"] == chance["chosen"] and items[0].texts["rejected"] == chance["rejected"]


@pytest.mark.parametrize(
    "kind, columns, more",
    [
        ("labels", {"question": "q", "response": "a", "safe": "safe"}, {"task": "safety"}),
        ("preferences", {"question": "q", "chosen": "a", "rejected": "b"}, {"task": "writing"}),
        ("general", {"question": "q", "response": "a"}, {"task": "writing"}),
        ("reasoning", {"question": "q", "answer": "n"}, {}),
        ("reasoning", {"question": "q"}, {"layout": "code"}),
        ("reasoning", {}, {"layout": "code"}),
    ],
)
def test_the_column_of_a_system_prompt_is_read_for_every_kind(tmp_path, kind, columns, more):
    row = {"q": "Why?", "a": "Yes.", "b": "No.", "n": "7", "safe": True, "s": "Be brief."}
    if more.get("layout"):
        row |= {"question": "Why?", "tests": [[[1, 2], 3]], "entry_point": "add"}
    (tmp_path / "rows.jsonl").write_text(lines([row]))
    listed = source(columns=columns | {"system": "s"}, **more)
    (item,) = Files(config(tmp_path, **{kind: [listed]})).items(kind)
    assert item.prompt.context == (Message("system", "Be brief."),)


def test_equal_pairs_are_set_aside_and_no_failure(tmp_path):
    rows = [{"prompt": f"Why {i}?", "chosen": "Yes.", "rejected": "No." if i else "Yes."} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text(lines(rows))
    said = []
    listed = [source(columns={}, task="writing")]
    files = Files(config(tmp_path, preferences=listed, bad_rows="refuse"), tmp_path, said.append)
    assert len(files.items("preferences")) == 2
    assert said[0].startswith("1 of 3 rows of") and EQUAL in said[0]
    (aside,) = map(json.loads, (tmp_path / "set_aside.jsonl").read_text().splitlines())
    assert aside["line"] == 1 and EQUAL in aside["reason"]


@pytest.mark.parametrize(
    "chosen, rejected, told",
    [
        (turns("Hi", "Yes."), turns("Ho", "No."), "answer different prompts"),
        (turns("Hi", "Yes.", "Why?"), turns("Hi", "Yes.", "What?"), "ends without an answer"),
        ("Yes.", "No.", "repeat no prompt; name its column as question"),
        ("", "No.", "repeat no prompt"),
    ],
)
def test_a_pair_without_one_prompt_is_told_by_line(tmp_path, chosen, rejected, told):
    good = {"chosen": HH + "Yes.", "rejected": HH + "No."}
    with pytest.raises(DataError, match=rf"rows\.jsonl line 2: .*{told}"):
        read(tmp_path, [good, {"chosen": chosen, "rejected": rejected}])


@pytest.mark.parametrize("column, value", [("is_safe", True), ("label", True), ("safe", "safe")])
def test_labelled_responses(tmp_path, column, value):
    item, files = first(tmp_path, {"prompt": "Wish", "response": "No.", column: value}, split="train")
    assert item.prompt.task == "safety" and files.safety_labels("train", 1, 0)[0].safe


# real files


@pytest.mark.parametrize("name", ["svamp", "mawps", "aime24"])
def test_real_files_are_told_to_be_what_their_descriptions_say(shared, name):
    described = Files(composed(name, f"data.path={shared}")).items("reasoning")
    told = open_data(composed("files", f"data.path={shared / name}.jsonl"), 0).items("reasoning")
    assert [(i.prompt.question, i.prompt.answer, i.texts) for i in told] == [
        (i.prompt.question, i.prompt.answer, i.texts) for i in described
    ]


def test_human_eval_is_a_benchmark_by_name_and_training_data_by_itself(shared):
    path = shared / "HumanEval.jsonl.gz"
    named = open_data(composed("humaneval", f"data.path={path}"), 0)
    assert len(named.prompts("test", ALL, 0)) == 164 and named.rows("train") == []
    told = open_data(composed("files", f"data.path={path}"), 0)
    assert len(told.prompts("train", ALL, 0)) > 100 and "layout code" in told.layouts[0]


# what is shown and refused


def test_the_layouts_of_the_config_are_those_that_are_known():
    assert set(LayoutName.__args__) == set(LAYOUTS) and len(Form) == 13


def test_a_layout_is_shown_before_anything_is_trained(tmp_path):
    _, files = read(tmp_path, SUMS)
    (told,) = files.layouts
    assert told.endswith(
        "40 rows of jsonl, layout table (inferred from its columns): question=question, answer=answer"
    )


def test_a_layout_may_be_named_and_its_columns_changed(tmp_path):
    rows = [{"chat": turns("Hi", "Hello"), "answer": "7", "question": "3 + 4?"}]
    item, _ = first(tmp_path, rows[0])
    assert item.prompt.answer == "7"
    (tmp_path / "rows.jsonl").write_text(lines(rows))
    named = source(task="writing", layout="conversation", columns={"conversation": "chat"})
    files = Files(config(tmp_path, general=[named]))
    assert files.items("general")[0].texts["response"] == "Hello" and "(named)" in files.layouts[0]


@pytest.mark.parametrize(
    "row, told",
    [
        (
            {"a": "1", "b": "2"},
            r"its columns \(a, b\) are no known layout of problems or other data; name the columns",
        ),
        (
            {"question": "a?", "problem": "b?", "answer": "1"},
            "several columns may be the question: question, problem; name it",
        ),
        (
            {"question": "a?", "answer": "1", "target": "2"},
            "several columns may be the answer: answer, target; name it",
        ),
    ],
)
def test_columns_that_are_not_told_apart_are_named_with_the_key_to_set(tmp_path, row, told):
    with pytest.raises(DataError, match=rf"rows\.jsonl: {told}, e\.g\. 'data\.reasoning=\[") as caught:
        first(tmp_path, row)
    (override,) = shlex.split(str(caught.value).partition("e.g. ")[2].replace("COLUMN", "a"))
    assert composed("files", override).reasoning[0].columns == {"question": "a", "answer": "a"}
    assert "\n" not in str(caught.value)


def test_a_column_that_is_empty_at_first_counts(tmp_path):
    rows = [
        {"instruction": f"Say {i}", "input": "twice" if i > 150 else "", "output": "a"} for i in range(160)
    ]
    items, _ = read(tmp_path, rows)
    assert items[159].prompt.question == "Say 159\ntwice"


def test_a_layout_of_another_kind_says_where_it_belongs(tmp_path):
    row = {"question": "?", "options": ["a", "b"], "answer": "A"}
    with pytest.raises(DataError, match=r"layout options is for data\.reasoning, not data\.general; name"):
        first(tmp_path, row, kind="general", layout="options")


def test_columns_that_differ_in_capitals_alone_stay_apart(tmp_path):
    item, _ = first(tmp_path, {"question": "a?", "answer": "1", "Answer": "2"})
    assert item.prompt.answer == "1"


def test_two_columns_that_hold_the_same_are_one(tmp_path):
    item, _ = first(tmp_path, {"question": "a?", "prompt": "a?", "answer": "1"})
    assert item.prompt.question == "a?"


def test_nested_columns_are_named_with_dots(tmp_path):
    rows = [{"m": [{"content": "3 + 4?"}], "r": {"gold": {"value": 7}}}, {"m": [{"content": "?"}], "r": None}]
    (tmp_path / "rows.jsonl").write_text(lines(rows[:1]))
    columns = {"question": "m.0.content", "answer": "r.gold.value"}
    (item,) = Files(config(tmp_path, reasoning=[source(columns=columns)])).items("reasoning")
    assert (item.prompt.question, item.prompt.answer) == ("3 + 4?", "7")
    with pytest.raises(DataError, match=r"line 1: column r holds no r\.gold\.price"):
        Files(config(tmp_path, reasoning=[source(columns=columns | {"answer": "r.gold.price"})])).items(
            "reasoning"
        )
    (tmp_path / "rows.jsonl").write_text(lines(rows))
    with pytest.raises(DataError, match=r"line 2: the answer \(column r\.gold\.value\) is empty"):
        Files(config(tmp_path, reasoning=[source(columns=columns)])).items("reasoning")
