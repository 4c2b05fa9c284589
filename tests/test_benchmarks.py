"""Benchmarks: what `benchmark=NAME` makes of a config, how a question is asked, how each kind is scored."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from fakes import House
from tiny_runs import load_stage

from r1pipe.config import EvaluateConfig, to_mapping
from r1pipe.config.benchmark import OWN_SCORING
from r1pipe.config.compose import Composed, compose
from r1pipe.config.data import SourceConfig
from r1pipe.config.groups import options
from r1pipe.core.errors import ConfigError, DataError
from r1pipe.core.paths import RunFolder
from r1pipe.core.types import Prompt
from r1pipe.data.files import Files
from r1pipe.data.items import parse_item
from r1pipe.data.reading import Row
from r1pipe.rewards import is_correct, votes
from r1pipe.rewards.drop import f1
from r1pipe.runs import lineage
from r1pipe.runs.problems import read_problems
from r1pipe.train.evaluation.benchmark_prompt import with_benchmark_prompt

R1 = {  # the 21 of its tables: Codeforces has two of them
    *("mmlu", "mmlu_redux", "mmlu_pro", "drop", "ifeval", "gpqa_diamond", "simpleqa", "frames"),
    *("alpaca_eval", "arena_hard", "livecodebench", "codeforces", "swe_bench", "aider", "aime24"),
    *("math500", "cnmo24", "cluewsc", "ceval", "c_simpleqa"),
}
ELSEWHERE = {
    *("ifeval", "simpleqa", "frames", "alpaca_eval", "arena_hard", "c_simpleqa"),
    *("codeforces", "swe_bench", "aider"),
    "lm_eval",  # without a task; tests/test_lm_eval.py
}


@cache
def composed(*words: str) -> Composed:
    return compose(["stage=evaluate", "parent=any", *words])


def think(summary: str, thought: str = "The answer is 999. Answer: Z") -> str:
    return f"<think>\n{thought}\n</think>\n\n{summary}"


def test_every_benchmark_of_r1_has_a_file() -> None:
    assert set(options("benchmark")) >= R1 and len(R1) == 20


@pytest.mark.parametrize("name", sorted(set(options("benchmark")) - ELSEWHERE))
def test_a_benchmark_brings_its_protocol(name: str) -> None:
    found = composed(f"benchmark={name}")
    benchmark, evaluation, data = found.config.benchmark, found.config.stage.eval, found.config.data
    assert benchmark and benchmark.name == name and benchmark.scored_by in OWN_SCORING
    assert (evaluation.temperature, evaluation.top_p, evaluation.general) == (0.6, 0.95, 0)
    assert (evaluation.samples, evaluation.problems) == (benchmark.samples, benchmark.problems)
    assert (benchmark.max_tokens, evaluation.max_tokens) == (32768, 512)  # what the laptop model reads
    assert data.name == benchmark.data and [source.split for source in data.reasoning] == ["test"]
    assert found.sources["stage.eval.samples"] == f"conf/benchmark/{name}.yaml"


@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_one_that_other_software_scores_is_refused_with_its_command(name: str) -> None:
    with pytest.raises(ConfigError, match=f"benchmark={name} is scored by .*; run .*r1pipe") as caught:
        composed(f"benchmark={name}")
    assert "\n" not in str(caught.value)


def test_r1s_numbers_of_samples() -> None:
    wanted = {"aime24": 64, "gpqa_diamond": 64, "math500": 16, "livecodebench": 8}
    assert {name: composed(f"benchmark={name}").config.stage.eval.samples for name in wanted} == wanted


def test_the_command_line_wins() -> None:
    words = ["benchmark=math500", "stage.eval.samples=2", "benchmark.problems=7", "data=svamp"]
    config = composed(*words).config
    assert (config.stage.eval.samples, config.stage.eval.problems, config.data.name) == (2, 7, "svamp")
    assert composed("benchmark=null").config.benchmark is None


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("benchmark=math5000", "no such benchmark; did you mean math500"),
        ("benchmark=math500 stage=grpo", "use `r1pipe eval CHECKPOINT benchmark=math500`"),
        ("benchmark=math500 benchmark.prompt=Solve", "must hold {question} once"),
        ("benchmark=math500 benchmark.top_p=0", "leaves nothing to draw"),
        ("benchmark=math500 benchmark.samples=0", "samples=0 must be 1 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused(words: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(["stage=evaluate", "parent=any", *words.split()])
    assert told in str(caught.value)


def test_of_a_folder_only_the_file_of_the_benchmark_is_measured(tmp_path: Path) -> None:
    for name, number in (("gsm8k_train", 1), ("gsm8k_test", 2)):
        row = {"question": f"1 + {number}?", "answer": f"1 + {number} = x\n#### {1 + number}"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    for path in (tmp_path, tmp_path / "gsm8k_test.jsonl"):
        config = composed("benchmark=gsm8k", f"data.path={path}").config
        assert [prompt.answer for prompt in Files(config.data).prompts("test", 9, 0)] == ["3"]


# --- how questions are asked


def item(name: str, **values: object) -> Prompt:
    data = composed(f"benchmark={name}", "data.path=x").config.data
    source: SourceConfig = data.reasoning[0]
    return parse_item("reasoning", source, Row(values, Path("f"), 3, "line"), {}, set()).prompt


def asked(name: str, prompt: Prompt) -> str:
    benchmark = composed(f"benchmark={name}").config.benchmark
    assert benchmark
    return with_benchmark_prompt(prompt, benchmark).question


def test_a_problem_is_asked_as_published_and_keeps_level_and_subject() -> None:
    row = {"problem": "What is $1+1$?", "answer": "2", "solution": "$1+1=2$", "subject": "Algebra"}
    prompt = item("math500", **row, level="Level 3")
    assert (prompt.level, prompt.subject) == (3, "Algebra")
    question = "What is $1+1$?\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert asked("math500", prompt) == question
    with pytest.raises(DataError, match=r"f line 3: the level 'hard' \(column level\) has no number"):
        item("math500", **row, level="hard")


def test_options_are_listed_as_the_benchmark_lists_them() -> None:
    row = {"question": "Which {question} is {options}?", "subject": "law", "choices": ["a", "b", "c", "d"]}
    prompt = item("mmlu", **row, answer=2)
    text = asked("mmlu", prompt)
    assert prompt.answer == "C" and text.endswith("Which {question} is {options}?\n\nA) a\nB) b\nC) c\nD) d")
    assert text.count("Which") == 1 and "'Answer: $LETTER'" in text
    assert "- A) a\n- B) b" in asked("mmlu_redux", prompt) and "\nA. a\nB. b" in asked("mmlu_pro", prompt)


def test_gpqa_s_right_option_is_not_always_the_first() -> None:
    answers = {}
    for number in range(40):
        wrong = {f"Incorrect Answer {n}": f"wrong {n}" for n in (1, 2, 3)}
        row = {"Question": f"Question {number}?", "Correct Answer": "right", **wrong}
        row["High-level domain"] = "Physics"
        prompt = item("gpqa_diamond", **row)
        assert prompt.checker["options"][prompt.answer] == "right" and prompt.subject == "Physics"
        assert prompt == item("gpqa_diamond", **row)
        answers[prompt.answer] = answers.get(prompt.answer, 0) + 1
    assert set(answers) == set("ABCD") and max(answers.values()) < 20
    with pytest.raises(DataError, match=r"an option of .* is empty"):
        item("gpqa_diamond", **row | {"Incorrect Answer 2": ""})


def test_a_question_made_of_several_columns() -> None:
    target = {"span1_text": "手机", "span2_text": "它"}
    prompt = item("cluewsc", text="手机响了，它很旧。", target=target, label="true")
    assert prompt.question == "手机响了，它很旧。\n此处，“它”是否指代“手机”？"
    assert "“答案：否”" in asked("cluewsc", prompt)
    assert is_correct(prompt, think("“它”指代“手机”。\n答案：是")) and is_correct(prompt, think("答案：是。"))
    assert not is_correct(prompt, think("答案：否")) and not is_correct(prompt, "<think>\n答案：是")


# --- how answers are scored


@pytest.mark.parametrize(
    ("name", "summary", "right"),
    [
        ("mmlu", "It is so.\n\nAnswer: C", True),
        ("mmlu", "Answer: $C$", True),
        ("mmlu", "Answer: **C**", True),
        ("mmlu", "Answer: (C) c", True),
        ("mmlu", "The answer is C.", True),
        ("mmlu", "Answer: B", False),
        ("mmlu", "I do not know.", False),
        ("mmlu_redux", '```json\n{\n    "reasoning": "B is wrong",\n    "answer": "C"\n}\n```', True),
        ("mmlu_redux", '{"reasoning": "not C", "answer": "B"}', False),
        ("mmlu_pro", "We see that the answer is (C).", True),
        ("mmlu_pro", "the answer is (D)", False),
    ],
)
def test_a_choice_is_read_from_what_follows_the_thought(name: str, summary: str, right: bool) -> None:
    row = {"question": "?", "choices": list("abcd"), "options": list("abcd"), "subject": "x", "category": "x"}
    prompt = item(name, **row, answer="C")
    assert is_correct(prompt, think(summary)) is right
    assert not is_correct(prompt, f"<think>\n{summary}")  # lighteval #790: a thought is not graded
    assert not is_correct(prompt, think("", thought=summary))


@pytest.mark.parametrize(
    ("said", "gold", "exact", "overlap"),
    [  # as AllenNLP's drop_eval.py gives them
        ("Answer: 3", "3", 1, 1),
        ("Answer: 3.0 yards", "3|three", 0, 2 * (1 / 2) / (3 / 2)),
        ("Answer: The Bears", "Bears", 1, 1),
        ("Answer: Chicago Bears", "Bears|Chicago  bears", 1, 1),
        ("Answer: Tom Brady", "Brady", 0, 2 / 3),
        ("Answer: 4 yards", "3 yards", 0, 0),
        ("First Answer: 3. Then\nAnswer: 25-yard", "25 yard", 1, 1),
        ("Peyton Manning", "Peyton Manning", 1, 1),
        ("Answer: 1,000", "1000", 1, 1),
        ("", "3", 0, 0),
    ],
)
def test_drop_is_scored_as_its_own_scorer_does(said: str, gold: str, exact: int, overlap: float) -> None:
    prompt = item("drop", context="A passage.\nQuestion: How many?\nAnswer:", ref_text=gold)
    assert is_correct(prompt, think(said)) == bool(exact)
    assert f1(prompt, said) == pytest.approx(overlap)
    assert not is_correct(prompt, f"<think>\nAnswer: {gold}")


def test_votes_of_drop_join_equal_answers() -> None:
    prompt = item("drop", context="?", ref_text="3")
    assert votes(prompt, [think("Answer: 3"), think("Answer: The 3.0"), think("Answer: 4")]) == [
        "3.0",
        "3.0",
        "4.0",
    ]


# --- end to end


def write_math(path: Path, count: int = 3) -> Path:
    rows = [
        {"problem": f"What is {i} + 1?", "answer": str(i + 1), "solution": "", "level": 1 + i % 2}
        | {"subject": "Algebra" if i else "Geometry"}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_eval_on_a_benchmark_of_any_checkpoint(house: House, tmp_path: Path, capsys) -> None:
    file = write_math(tmp_path / "math500.jsonl")
    assert house.call("run", "stage=cold_start", "seed=4", "data.tasks=[word]") == 0
    run_id = house.runs("cold_start")[0].name
    capsys.readouterr()
    assert house.call("eval", run_id, "benchmark=math500", f"data.path={file}", "stage.eval.samples=2") == 0
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith("evaluating on MATH-500: 2 samples a problem at temperature 0.6, top-p 0.95")
    assert said.endswith("answers of 32,768 tokens do not fit the model: they end with its context of 512")
    made = json.loads((house.runs("evaluate")[0] / "config.json").read_text())
    assert (made["data"]["name"], made["seed"], made["stage"]["eval"]["samples"]) == ("math500", 0, 2)
    assert made["benchmark"]["name"] == "math500"


def test_a_job_measures_a_benchmark_and_keeps_every_completion(tmp_path: Path) -> None:
    file = write_math(tmp_path / "math500.jsonl")
    words = ["stage=evaluate", "parent=base", "model=laptop", "benchmark=math500", f"data.path={file}"]
    words += ["stage.eval.samples=2", "stage.eval.max_tokens=6", "stage.eval.greedy=true"]
    config = compose(["recipe=smoke", "engine.ranks=1", "engine.threads=1", *words]).config
    assert isinstance(config.stage, EvaluateConfig)
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    config = replace(config, weights_from=lineage.bundled())
    folder.config.write_text(json.dumps(to_mapping(config)))
    load_stage("evaluate").main(str(folder.path))
    found = json.loads(folder.evaluation.read_text())
    assert (found["benchmark"], found["problems"], found["samples"], found["k"]) == ("math500", 3, 6, 2)
    assert set(found["by_level"]) == {"1", "2"} and set(found["by_subject"]) == {"Algebra", "Geometry"}
    assert set(found["pass_at_k"]) == set(found["maj_at_k"]) == {"1", "2"}
    problems = read_problems(folder)
    assert len(problems) == 3 and all(len(problem.drawn) == 2 for problem in problems)
    assert all("Please reason step by step" in problem.question for problem in problems)
    assert "evaluation.parquet" in json.loads(folder.record.read_text())["files"]


@pytest.mark.parametrize(
    ("name", "file"),
    [
        *(("math500", "."), ("aime24", "."), ("gsm8k", "."), ("svamp", "."), ("mawps", ".")),
        *(("cn_middle_school", "."), ("humaneval", "HumanEval.jsonl.gz")),
    ],
)
def test_real_files_are_measured_as_a_whole(shared: Path, name: str, file: str) -> None:
    config = composed(f"benchmark={name}", f"data.path={shared / file}").config
    assert config.benchmark
    prompts = Files(config.data).prompts("test", 10**6, 0)
    assert len(prompts) == config.benchmark.problems
    asked_of = [with_benchmark_prompt(prompt, config.benchmark).question for prompt in prompts]
    assert all(prompt.question in text for prompt, text in zip(prompts, asked_of, strict=True))
    if name == "math500":
        assert {prompt.level for prompt in prompts} == {1, 2, 3, 4, 5}
        assert len({prompt.subject for prompt in prompts}) == 7


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "gsm8k.jsonl is empty"),
        ('{"question": "a", "answer": "#### 3"}\n{"question":\n', "gsm8k.jsonl line 2 is not JSON"),
        ('{"q": "a", "a": "3"}\n', "gsm8k.jsonl line 1 has no column answer; known: a, q"),
        ('{"question": "a", "answer": "3"}\n', "gsm8k.jsonl line 1: '####' is missing"),
    ],
)
def test_a_wrong_file_is_one_line_before_weights_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, told: str
) -> None:
    (tmp_path / "gsm8k.jsonl").write_text(content)
    words = ["model=laptop", "engine.ranks=1", "benchmark=gsm8k", f"data.path={tmp_path / 'gsm8k.jsonl'}"]
    config = replace(composed(*words).config, weights_from=lineage.bundled())
    run = RunFolder(tmp_path / "run")
    run.create()
    run.config.write_text(json.dumps(to_mapping(config)))
    stage = load_stage("evaluate")
    monkeypatch.setattr(stage, "load_weights", None)
    with pytest.raises(SystemExit) as ended:
        stage.main(str(run.path))
    line = run.error.read_text()
    assert ended.value.code == 2 and told in line and line.count("\n") == 1
