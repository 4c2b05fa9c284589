"""Data from files and reasoning-gym: what is read, what is refused and how, and splits that never overlap."""

import builtins
import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import pytest

from r1pipe.chat.template import parse
from r1pipe.config import DataConfig, SourceConfig
from r1pipe.config import data as data_rules
from r1pipe.config.compose import compose
from r1pipe.core.errors import ConfigError, DataError, EnvironmentProblem
from r1pipe.core.types import GENERAL_TASKS, Completion
from r1pipe.data import open_data, reasoning_gym
from r1pipe.data.files import Files
from r1pipe.data.items import worked
from r1pipe.data.reading import read_file
from r1pipe.data.world import corpus, countdown, general, program, word
from r1pipe.data.world.content import LANGUAGES
from r1pipe.rewards import BASE_REWARDS
from r1pipe.rewards import gym as scorers
from r1pipe.runs import data_files as datafiles

ROOT = Path(__file__).parents[1]
ALL = 10**6  # more than any file holds
SPLITS = ("train", "dev", "test")
REAL_FILES = ("svamp", "mawps", "gsm8k", "math500", "aime24", "cn_middle_school")


def source(path="rows.jsonl", task="sums", **changes):
    columns = {"question": "question", "answer": "answer"}
    values = {"columns": columns, "answer_after": None, "language": "en", "split": None}
    return SourceConfig(path=path, task=task, **values | changes)


def config(path, **changes):
    empty = {
        "tasks": [],
        "languages": [],
        "levels": [],
        "reasoning": [],
        "general": [],
        "preferences": [],
        "labels": [],
    }
    rows = {"bad_rows": "refuse", "max_bad_rows": 0.5, "longest_row": 1000}
    values = {"name": "mine", "kind": "files", "path": str(path), "substitutions": {}} | empty | rows
    return DataConfig(**values | changes)


def problems(path, rows, **changes):
    """A source of `rows` written to a jsonl file in `path`."""
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Files(config(path, reasoning=[source(**changes)]))


SUMS = [{"question": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(300)]


def raise_first(file):
    if file.bad:
        raise DataError(file.bad[0].reason)


def composed(name, *overrides):
    return compose(["stage=grpo", f"data={name}", *overrides]).config.data


# what is read


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "jsonl.gz"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    rows = [{"question": "Sum of 1, 2\nand 3?", "answer": "6"}, {"question": "七加一？", "answer": "8"}]
    path = tmp_path / f"rows.{suffix}"
    if suffix == "csv":
        path.write_text('question,answer\n"Sum of 1, 2\nand 3?",6\n七加一？,8\n', encoding="utf-8")
    elif suffix == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix == "json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        text = "\n\n".join(json.dumps(row) for row in rows).encode()  # an empty line is no row
        path.write_bytes(gzip.compress(text) if suffix.endswith("gz") else text)
    assert [row.values for row in read_file(path).rows] == rows


def test_csv_fields_stay_text(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("question,answer\nWhich agent?,007\nNA,\n")
    assert [row.values["answer"] for row in read_file(path).rows] == ["007", ""]
    assert read_file(path).rows[1].values["question"] == "NA"


def test_reading_leaves_nothing_in_the_home_and_sees_a_changed_file(tmp_path):
    home, path = tmp_path / "home", tmp_path / "rows.jsonl"
    home.mkdir()
    code = (
        "import pathlib, sys; from r1pipe.data.reading import read_file; path = pathlib.Path(sys.argv[1])\n"
        "for n in (1, 2):\n"
        "    path.write_text('{\"a\": %d}\\n' % n)\n"
        "    assert [row.values for row in read_file(path).rows] == [{'a': n}]"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
    subprocess.run([sys.executable, "-c", code, path], check=True, env=environment | {"HOME": str(home)})
    assert list(home.rglob("*")) == []


def test_columns_join_and_fall_back(tmp_path):
    rows = [
        {"body": "Ann has 3.", "ask": "And one more?", "letter": "", "value": 4.0},
        {"body": "", "ask": "Which?", "letter": "B", "value": 9.5},
    ]
    columns = {"question": "body + ask", "answer": "letter | value"}
    data = problems(tmp_path, rows, columns=columns, split="test")
    found = {prompt.question: prompt.answer for prompt in data.prompts("test", ALL, 0)}
    assert found == {"Ann has 3.\nAnd one more?": "4", "Which?": "B"}


def test_language_is_told_by_the_question(tmp_path):
    rows = [{"question": "小明有3个苹果，又买了x个，一共7个。x是多少？", "answer": "4"}, SUMS[0]]
    data = problems(tmp_path, rows, language="auto", split="test")
    assert {prompt.answer: prompt.language for prompt in data.prompts("test", ALL, 0)} == {
        "4": "zh",
        "1": "en",
    }


def test_substitutions_fill_identity_rows(tmp_path):
    (tmp_path / "who.json").write_text(json.dumps([{"q": "Who are you?", "r": "I am {{name}}."}]))
    general = source("who.json", task="identity", columns={"question": "q", "response": "r"}, split="train")
    named = Files(config(tmp_path, general=[general], substitutions={"name": "Ada"}))
    assert [trace.response for trace in named.general_demonstrations(1, 0, {})] == ["I am Ada."]
    with pytest.raises(
        DataError, match=r"who\.json row 1: \{\{name\}\} has no text; set \+data\.substitutions\.name"
    ):
        Files(config(tmp_path, general=[general])).general_demonstrations(1, 0, {})


def test_a_conversation_becomes_one_question(tmp_path):
    turns = [("human", "Hi"), ("gpt", "Hello"), ("human", "Why?")]
    rows = [
        {
            "c": [{"from": who, "value": what} for who, what in turns],
            "yes": {"from": "gpt", "value": "Because."},
            "no": {"role": "assistant", "content": "No."},
        }
    ]
    (tmp_path / "p.json").write_text(json.dumps(rows))
    columns = {"question": "c", "chosen": "yes", "rejected": "no"}
    data = Files(
        config(tmp_path, preferences=[source("p.json", task="writing", columns=columns, split="train")])
    )
    pair = data.preference_pairs("train", 1, 0)[0]
    assert pair.prompt.question == "User: Hi\n\nAssistant: Hello\n\nUser: Why?"
    assert (pair.chosen, pair.rejected) == ("Because.", "No.")
    assert data.safety_labels("train", 9, 0) == []


# what is refused


@pytest.mark.parametrize(
    "name, content, told",
    [
        (
            "rows.jsonl",
            '{"question": "a", "answer": "1"}\n\n{"question": \n',
            r"rows\.jsonl line 3 is not JSON",
        ),
        ("rows.jsonl", "", r"rows\.jsonl is empty; download"),
        ("rows.jsonl", b'{"question": "\xe9"}\n', r"rows\.jsonl line 1 is not UTF-8; save"),
        ("rows.jsonl", '{"question": "a", "answer": "1"}\n7\n', r"rows\.jsonl line 2 is not a JSON object"),
        ("rows.json", '[{"question": "a"},\n {"question": "b"', r"rows\.json line 2 is not JSON"),
        ("rows.csv", "question,answer\na,1\nb,2,3\n", r"rows\.csv line 3 cannot be read"),
        ("rows.parquet", "no parquet", r"rows\.parquet cannot be read \(.*\); download it again"),
        ("rows.jsonl.gz", "no gzip", r"rows\.jsonl\.gz cannot be read \(Not a gzipped file"),
        ("rows.txt", "a", r"rows\.txt is of an unknown format; give one of \.json"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_by_line(tmp_path, name, content, told):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=told) as caught:
        raise_first(read_file(path))
    assert "\n" not in str(caught.value)


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "gsm8k_train.jsonl").write_text("{}")
    with pytest.raises(
        DataError, match=r"does not exist; did you mean gsm8k_train\.jsonl\? Set data\.path=FILE"
    ):
        read_file(tmp_path / "gsm8k-train.jsonl")
    with pytest.raises(DataError, match="nor does its folder"):
        read_file(tmp_path / "nowhere" / "rows.jsonl")


@pytest.mark.parametrize(
    "row, told",
    [
        ({"questoin": "a", "answer": "1"}, r"line 4 has no column question; did you mean questoin\?"),
        ({"question": "  ", "answer": "1"}, r"line 4: the question \(column question\) is empty"),
        ({"question": "What?", "answer": ""}, r"line 4: the answer \(column answer\) is empty"),
        ({"question": "What?", "answer": "\\frac{1}{"}, r"line 4: the gold answer .* does not parse"),
    ],
)
def test_a_bad_row_is_told_by_file_and_line(tmp_path, row, told):
    lines = [json.dumps(SUMS[0]), "", json.dumps(SUMS[1]), json.dumps(row)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    if "questoin" in row:  # a column is lacking in the whole file
        (tmp_path / "rows.jsonl").write_text("\n".join(["", "", "", json.dumps(row)]))
    with pytest.raises(DataError, match=rf"rows\.jsonl {told}"):
        Files(config(tmp_path, reasoning=[source()])).prompts("train", 1, 0)


def test_a_worked_answer_without_its_mark_is_refused(tmp_path):
    data = problems(tmp_path, [{"question": "a", "answer": "It is 7."}], answer_after="####")
    with pytest.raises(DataError, match=r"rows\.jsonl line 1: '####' is missing before the final answer"):
        data.prompts("train", 1, 0)


@pytest.mark.parametrize(
    "change, told",
    [
        (
            {"columns": {"question": "q", "anwser": "a"}},
            r"columns\.anwser is not a role; did you mean answer\?",
        ),
        ({"columns": {"question": "q"}}, r"data\.reasoning\[0\]\.columns\.answer is missing"),
        ({"split": "tset"}, r"split=tset is not a split; did you mean test\?"),
        ({"language": "english"}, r"language=english is unknown; known: af, "),
        ({"task": "writing"}, r"task=writing: it may not be one of writing"),
    ],
)
def test_a_wrong_description_names_the_key(tmp_path, change, told):
    with pytest.raises(ConfigError, match=told):
        Files(config(tmp_path, reasoning=[source(**change)]))


def test_kinds_that_lack_something_say_so(tmp_path):
    data = problems(tmp_path, SUMS, split="test")
    with pytest.raises(DataError, match="data=mine has no problems to train on"):
        data.prompts("train", 8, 0)
    with pytest.raises(DataError, match="data=mine has no worked solutions"):
        data.demonstrations(8, 0, {}, True)
    with pytest.raises(ConfigError, match="no documents"):
        data.documents(0)
    with pytest.raises(ConfigError, match="names no file"):
        Files(config(tmp_path))


UNUSED = "is not used by data="


@pytest.mark.parametrize(
    "overrides, told",
    [
        (["data.path=my.jsonl"], f"data.path {UNUSED}world; for files, choose .* data=files data.path=FILE"),
        (
            ["data.reasoning=[{path:a,columns:{},answer_after:null,language:en,task:a,split:null}]"],
            "data.reasoning",
        ),
        (["+data.substitutions.name=Ada"], f"data.substitutions {UNUSED}world"),
        (["data.bad_rows=set_aside"], f"data.bad_rows {UNUSED}world"),
        (["data.longest_row=9"], f"data.longest_row {UNUSED}world"),
        (["data=gsm8k", "data.levels=[1]"], f"data.levels {UNUSED}gsm8k; leave it out, or choose data=world"),
        (["data=gsm8k", "data.tasks=[word]"], f"data.tasks {UNUSED}gsm8k"),
        (["data=reasoning_gym", "data.languages=[en]"], f"data.languages {UNUSED}reasoning_gym"),
        (["data=reasoning_gym", "data.path=my.jsonl"], f"data.path {UNUSED}reasoning_gym"),
        (["data.languages=[fr]"], "data.languages: the bundled world has no fr; choose from en, zh"),
        (["data.languages=[en,fr]"], "data.languages: the bundled world has no fr"),
        (["data.tasks=[x]"], "data.tasks: the bundled world has no x; choose from word, countdown, program"),
        (["data.levels=[9]"], "data.levels: the bundled world has no 9; choose from 1, 2, 3, 4"),
        (["data.tasks=[]"], "data.tasks is empty; choose from word"),
        (["stage=cold_start", "+stage.styles.hasty=1"], "stage.styles.hasty: the bundled world has none"),
        (["stage=cold_start", "stage.styles={terse: 0}"], "stage.styles=.*: one share must be above 0"),
        (
            ["stage=rejection_sft", "+stage.general_kinds.poems=1"],
            "stage.general_kinds.poems: .* none; choose",
        ),
    ],
)
def test_what_the_chosen_data_does_not_use_or_have_is_refused_when_composed(overrides, told):
    with pytest.raises(ConfigError, match=told) as caught:
        compose(["stage=grpo", *overrides])
    assert "\n" not in str(caught.value)


def test_the_rules_know_what_the_world_has():
    known = data_rules.WORLD
    assert set(known["tasks"]) == set(corpus.TASKS) and known["languages"] == LANGUAGES
    assert set(known["levels"]) == set(program.STEPS) == set(countdown.SHAPES) == set(word.STEPS)
    assert get_args(corpus.Strategy) == data_rules.STYLES and {*GENERAL_TASKS} == {*general.THOUGHTS}


def test_problems_of_ones_own_need_a_path_alone(tmp_path):
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SUMS))
    data = open_data(composed("files", f"data.path={tmp_path / 'my.jsonl'}"), 0)
    assert sum(len(data.prompts(split, ALL, 0)) for split in SPLITS) == len(SUMS)


# splits


def asked(data, split):
    return {prompt.question for prompt in data.prompts(split, ALL, 0)}


def test_splits_are_whole_disjoint_and_the_same_in_any_order(tmp_path):
    splits = {split: asked(problems(tmp_path, SUMS), split) for split in SPLITS}
    assert sum(map(len, splits.values())) == len(set.union(*splits.values())) == len(SUMS)
    assert all(splits.values())
    again = problems(tmp_path, SUMS[::-1])
    assert {split: asked(again, split) for split in SPLITS} == splits


def test_a_question_differing_in_spaces_or_capitals_stays_in_one_split(tmp_path):
    shouted = [
        {"question": row["question"].upper().replace(" ", "  "), "answer": row["answer"]} for row in SUMS
    ]
    data = problems(tmp_path, SUMS + shouted)
    words = [{question.lower().replace("  ", " ") for question in asked(data, split)} for split in SPLITS]
    assert sum(map(len, words)) == len(set.union(*words)) == len(SUMS)


def test_a_declared_test_file_is_held_out_of_all_others(tmp_path):
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SUMS[:50]))
    problems(tmp_path, SUMS)  # holds the test file's rows too
    both = Files(config(tmp_path, reasoning=[source(), source("test.jsonl", split="test")]))
    held_out = {row["question"] for row in SUMS[:50]}
    assert asked(both, "test") == held_out
    assert not held_out & (asked(both, "train") | asked(both, "dev"))
    assert len(asked(both, "train") | asked(both, "dev")) == 250


def test_drawing_is_seeded_and_never_repeats(tmp_path):
    data = problems(tmp_path, SUMS)
    assert data.prompts("train", 20, 1) == data.prompts("train", 20, 1) != data.prompts("train", 20, 2)
    assert (
        len({prompt.id for prompt in data.prompts("train", ALL, 1)})
        == len(data.prompts("train", ALL, 1))
        < 300
    )


def test_solutions_may_be_learned_from_where_nothing_is_asked_and_task_by_task(tmp_path):
    columns = {"question": "question", "answer": "answer", "solution": "question"}
    both = [
        source(task="sums", columns=columns),
        source("more.jsonl", task="taught", columns=columns, split="train", prompts=False),
    ]
    for name, rows in (("rows", SUMS[:200]), ("more", SUMS[200:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Files(config(tmp_path, reasoning=both))
    tasks = {split: Counter(prompt.task for prompt in data.prompts(split, ALL, 0)) for split in SPLITS}
    assert sum((tasks[split] for split in SPLITS), Counter()) == {"sums": 200}
    for styles, expected in (({}, {"sums", "taught"}), ({"taught": 1.0}, {"taught"})):
        learned = Counter(trace.prompt.task for trace in data.demonstrations(ALL, 0, styles, True))
        assert learned.keys() == expected and learned["taught"] == 100
    halves = Counter(
        trace.prompt.task for trace in data.demonstrations(80, 0, {"sums": 3, "taught": 1}, True)
    )
    assert halves == {"sums": 60, "taught": 20}
    with pytest.raises(DataError, match=r"stage\.styles\.tought has no worked solutions.*taught"):
        data.demonstrations(80, 0, {"tought": 1.0}, True)


def test_the_hash_follows_content_and_not_place(tmp_path):
    hashes = []
    for folder, rows in (("a", SUMS), ("b", SUMS), ("c", SUMS[1:])):
        (tmp_path / folder).mkdir()
        made = problems(tmp_path / folder, rows)
        hashes.append(made.hash)
        in_a_record = json.loads(json.dumps(asdict(made.config)))
        assert datafiles.hashes(in_a_record)[0] == made.hash, "what the lineage asks"
    assert hashes[0] == hashes[1] != hashes[2]


# the shipped descriptions, on the real files


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "data").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_data_config_composes(path):
    data = composed(path.stem)
    assert data.name == path.stem and data.kind in data_rules.USED


@pytest.mark.parametrize("name", REAL_FILES)
def test_real_problems_load_with_gold_answers_that_earn_the_reward(shared, name):
    data = open_data(composed(name, f"data.path={shared}"), 0)
    held_out = data.prompts("test", ALL, 0)
    assert len(held_out) >= 30
    for prompt in held_out[:20]:
        text = f"<think>\nx\n</think>\n\nThe answer is \\boxed{{{prompt.answer}}}."
        assert BASE_REWARDS["accuracy"](prompt, Completion([], [], "stop", text)).value == 1.0, prompt


@pytest.mark.parametrize(
    ("solution", "answer", "written"),
    [
        ("( 14.0 + 39.0 )", "53", "14 + 39 = 53"),
        ("( ( 3.0 + 5.0 ) * 2.5 )", "20", "( 3 + 5 ) * 2.5 = 20"),
        ("( 3.0 + 5.0 ) * ( 4.0 - 1.0 )", "24", "( 3 + 5 ) * ( 4 - 1 ) = 24"),
        ("-43.0", "-43", "-43.0"),
        ("48/2 = <<48/2=24>>24.0 in May", "24", "48/2 = 24.0 in May"),
    ],
)
def test_an_equation_alone_gets_its_value_and_other_solutions_stay(solution, answer, written):
    assert worked(solution, answer) == written


def test_gsm8k_solutions_become_traces(shared):
    data = open_data(composed("gsm8k", f"data.path={shared}"), 0)
    assert len(data.prompts("test", ALL, 0)) == 1319
    demonstrations = data.demonstrations(200, 0, {}, True)
    for trace in demonstrations:
        response = parse(trace.response)
        assert response.well_formed and "<<" not in trace.response and "####" not in trace.response
        assert response.summary == f"The answer is {trace.prompt.answer}."
        assert BASE_REWARDS["accuracy"](trace.prompt, Completion([], [], "stop", trace.response)).value == 1.0
    assert demonstrations[0].source.startswith("gsm8k_train.jsonl:")


def test_a_single_file_is_split_by_hash(shared):
    data = open_data(composed("gsm8k", f"data.path={shared / 'gsm8k_test.jsonl'}"), 0)
    sizes = {split: len(data.prompts(split, ALL, 0)) for split in SPLITS}
    assert sum(sizes.values()) == 1319 and min(sizes.values()) > 30


def test_one_folder_serves_every_stage(shared):
    data = open_data(composed("real", f"data.path={shared}"), 0)
    general = data.general_demonstrations(ALL, 0, {})
    assert {trace.prompt.task for trace in general} == {"writing", "identity"}
    assert {trace.prompt.language for trace in general} == {"en", "zh"}
    assert not any("{{" in trace.response for trace in general)
    assert any("r1pipe" in trace.response for trace in general)
    pairs = {
        split: {pair.prompt.question for pair in data.preference_pairs(split, ALL, 0)} for split in SPLITS
    }
    assert len(pairs["train"]) > 400 and not pairs["train"] & pairs["test"]
    assert data.safety_labels("train", ALL, 0) == []
    assert data.prompts("train", 4, 0) and data.general_prompts("test", 4, 0, {})


def test_pairs_are_read_as_labels_too(shared):
    data = open_data(composed("preferences", f"data.path={shared}"), 0)
    labels = {split: data.safety_labels(split, ALL, 0) for split in SPLITS}
    pairs = {split: data.preference_pairs(split, ALL, 0) for split in SPLITS}
    for split in SPLITS:
        assert len(labels[split]) == 2 * len(pairs[split]) > 0
        read = {(label.prompt.id, label.response, label.safe) for label in labels[split]}
        told = {(p.prompt.id, p.chosen, True) for p in pairs[split]}
        assert read == told | {(p.prompt.id, p.rejected, False) for p in pairs[split]}


def labelled(tmp_path, *safe):
    rows = [{"ask": f"Wish {i}", "say": "No.", "ok": value} for i, value in enumerate(safe)]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"question": "ask", "response": "say", "safe": "ok"}
    return Files(config(tmp_path, labels=[source("l.jsonl", task="safety", columns=columns, split="train")]))


@pytest.mark.parametrize(("yes", "no"), [(True, False), (1, 0), ("safe", "Unsafe"), ("true", "false")])
def test_labelled_responses_are_read(tmp_path, yes, no):
    labels = labelled(tmp_path, yes, no, no).safety_labels("train", ALL, 0)
    assert sorted((label.prompt.question, label.safe) for label in labels) == [
        ("Wish 0", True),
        ("Wish 1", False),
        ("Wish 2", False),
    ]


def test_a_label_that_says_neither_is_refused_with_its_line(tmp_path):
    with pytest.raises(DataError, match=r"l\.jsonl line 2: column ok holds 'maybe'.*safe, unsafe"):
        labelled(tmp_path, "safe", "maybe").safety_labels("train", ALL, 0)


# reasoning-gym


def gym(*tasks):
    return reasoning_gym.ReasoningGym(config(None, kind="reasoning_gym", tasks=list(tasks)))


def test_reasoning_gym_problems_are_seeded_disjoint_and_scored_by_their_task():
    data = gym("leg_counting", "basic_arithmetic")
    splits = {split: data.prompts(split, 40, 7) for split in SPLITS}
    questions = [{prompt.question for prompt in prompts} for prompts in splits.values()]
    assert [len(each) for each in questions] == [40, 40, 40] and len(set.union(*questions)) == 120
    assert splits["train"] == data.prompts("train", 40, 7) != data.prompts("train", 40, 8)
    assert {prompt.task for prompt in splits["test"]} == {"leg_counting", "basic_arithmetic"}
    for prompt in splits["test"]:
        task, entry = prompt.task, prompt.checker["entry"]
        assert scorers.score(task, entry, prompt.answer) == 1.0
        assert scorers.score(task, entry, "no number") < 1.0


def test_an_exhausted_task_gives_fewer_and_never_repeats(monkeypatch):
    monkeypatch.setattr(
        reasoning_gym, "_prompt", lambda task, index, make=reasoning_gym._prompt: make(task, index % 30)
    )
    prompts = gym("leg_counting").prompts("train", 50, 0)
    assert 10 < len(prompts) == len({prompt.id for prompt in prompts}) <= 30


def test_reasoning_gym_names_are_checked():
    with pytest.raises(ConfigError, match=r"no task chain_sums; did you mean chain_sum\?"):
        gym("chain_sums")
    with pytest.raises(ConfigError, match="composite cannot be used by its name alone"):
        gym("composite")
    with pytest.raises(ConfigError, match=r"data\.tasks is empty"):
        gym()


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch):
    real = builtins.__import__

    def missing(name, *rest):
        if name.startswith("reasoning_gym"):
            raise ImportError("No module named 'reasoning_gym'")
        return real(name, *rest)

    scorers.dataset.cache_clear()
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(EnvironmentProblem, match="pip install reasoning-gym"):
        gym("chain_sum")


# bad rows, set aside


def with_bad_rows(tmp_path, **changes):
    lines = [json.dumps(row) for row in SUMS[:8]]
    lines[2:2] = ["{", json.dumps({"question": "What?"}), json.dumps({"question": "x" * 2000, "answer": "1"})]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return config(tmp_path, reasoning=[source(split="train")], **{"bad_rows": "set_aside"} | changes)


def test_bad_rows_are_set_aside_with_their_reasons(tmp_path):
    said = []
    data = open_data(with_bad_rows(tmp_path), 0, tmp_path, said.append)
    assert asked(data, "train") == {row["question"] for row in SUMS[:8]}
    aside = [json.loads(line) for line in (tmp_path / "set_aside.jsonl").read_text().splitlines()]
    reasons = ["is not JSON", "the answer (column answer) is empty", "is longer than data.longest_row=1000"]
    assert [row["line"] for row in aside] == [3, 4, 5]
    assert all(reason in row["reason"] for reason, row in zip(reasons, aside, strict=True))
    assert len(said) == 1 and said[0].startswith("3 of 11 rows of") and "line 3 is not JSON" in said[0]


def test_more_bad_rows_than_allowed_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"3 of 11 rows .* data\.max_bad_rows=0\.2; the first: .* line 3"):
        Files(with_bad_rows(tmp_path, max_bad_rows=0.2)).prompts("train", 1, 0)


def test_bad_rows_are_refused_where_nobody_says_otherwise(tmp_path):
    assert composed("gsm8k").bad_rows == "refuse"
    with pytest.raises(DataError, match=r"rows\.jsonl line 3 is not JSON"):
        Files(with_bad_rows(tmp_path, bad_rows="refuse")).prompts("train", 1, 0)
    with pytest.raises(ConfigError, match=r"data\.bad_rows=keep is none of refuse, set_aside"):
        composed("gsm8k", "data.bad_rows=keep")
