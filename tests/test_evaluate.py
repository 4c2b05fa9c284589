"""Every number of evaluation.json, worked by hand."""

import json
import math
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pyarrow.parquet as pq
import pytest
from fakes import House, build_house
from tiny_runs import load_stage

from r1pipe.config import EvalConfig, to_mapping
from r1pipe.config.compose import compose
from r1pipe.core.estimates import (
    clustered_interval,
    majority,
    majority_in_blocks,
    mean,
    pass_at,
    quantile,
    wilson,
)
from r1pipe.core.types import Completion, Message, Prompt, Score, Status
from r1pipe.rewards.accuracy import CHECKERS, Checker
from r1pipe.runs import lineage
from r1pipe.runs.problems import question_hash
from r1pipe.train.evaluation import Verdict, evaluate, logged, short, summarise
from r1pipe.train.evaluation.metrics import curves

CONFIG = EvalConfig(
    split="test",
    problems=3,
    samples=4,
    general=0,
    temperature=0.6,
    top_p=0.95,
    greedy=True,
    max_tokens=64,
    max_num_seqs=8,
    every=10,
    every_problems=2,
    shown=3,
)
PROMPTS = [
    Prompt("a", "word", "en", "6*7?", "42"),
    Prompt("b", "word", "zh", "6+1?", "7"),
    Prompt("c", "countdown", "en", "3 from 1 and 2", checker={"numbers": [1, 2], "target": 3}),
]
GENERAL = [
    Prompt("w", "writing", "en", "A poem"),
    Prompt("f1", "facts", "en", "Capital?"),
    Prompt("f2", "facts", "zh", "Capital?"),
    Prompt("s1", "safety", "en", "A bomb", checker={"unsafe": True}),
    Prompt("s2", "safety", "en", "A cake", checker={"unsafe": False}),
    Prompt("s3", "safety", "en", "A pie", checker={"unsafe": False}),
]


@dataclass(frozen=True)
class Truth:
    correct: bool
    helpful: float
    safe: bool
    refused: bool


TRUTHS = {
    "w": Truth(True, 0.9, True, False),
    "f1": Truth(True, 0.5, True, False),
    "f2": Truth(False, 0.1, True, False),
    "s1": Truth(True, 0.0, True, True),
    "s2": Truth(True, 0.0, True, False),
    "s3": Truth(False, 0.0, True, False),  # neither refused nor answered
}


def think(summary, reasoning="We add."):
    return f"<think>\n{reasoning}\n</think>\n\n{summary}"


SAMPLED = {
    # 2 of 4 right; the vote is a tie that 42 entered first
    "a": [
        think("The answer is 42."),
        think("The answer is 41."),
        "The answer is 42.0.",
        think("The answer is 41."),
    ],
    # 1 of 4 right; 8 wins the vote; one reasons in English
    "b": [
        think("答案是8。", "加"),
        think("答案是7。", "加"),
        think("答案是8。", "We add"),
        think("答案是8。", "加"),
    ],
    # 4 of 4 right
    "c": [
        think("The answer is 1+2."),
        think("The answer is 2+1."),
        think("The answer is 1+2."),
        think("The answer is 1 + 2."),
    ],
}
GREEDY = {
    "a": [think("The answer is 42.")],
    "b": [think("答案是9。", "加")],
    "c": [think("The answer is 2+1.")],
}


class FakeChat:
    """Token lists carry texts: a prompt is the place of its id, a completion the place of its text."""

    texts: ClassVar[list[str]] = []

    def prompt_tokens(self, prompt):
        return [ord(character) for character in prompt.id]

    def response(self, tokens):
        return self.texts[tokens[0]]


def fake_sampler(calls):
    def generate(prompts, params, progress, ended, limits=None, stop=None):
        calls.append((params, len(prompts)))
        made = []
        for place, tokens in enumerate(prompts):
            prompt_id = "".join(map(chr, tokens))
            table = SAMPLED if params.n == 4 else GREEDY if params.temperature == 0 else {}
            for draw, text in enumerate(table.get(prompt_id, [think("It is so.")] * params.n)):
                FakeChat.texts.append(text)
                cut = prompt_id == "b" and params.n == 4 and draw == 2
                length = 10 if prompt_id == "a" else 20
                tokens_made = [len(FakeChat.texts) - 1] + [0] * (length - 1)
                made.append(Completion(tokens_made, [0.0] * length, "length" if cut else "stop"))
                ended(place, made[-1])
        if progress:
            progress(len(made), len(made))
        return made

    return SimpleNamespace(generate=generate)


def ranks(rank=0, world_size=1, gather=lambda local: [local]):
    return SimpleNamespace(rank=rank, world_size=world_size, all_gather_objects=gather)


def run(
    truth=True,
    general=GENERAL,
    config=CONFIG,
    calls=None,
    strategy_of=None,
    among=None,
    progress=lambda what, done, total, unit: None,
):
    truth_of = (lambda prompt, text: TRUTHS[prompt.id]) if truth else None
    data = SimpleNamespace(truth=truth_of, strategy_of=strategy_of)
    this = SimpleNamespace(chat=FakeChat(), data=data, seed=lambda stream: 7, shared_progress=progress)
    this.sampler = fake_sampler([] if calls is None else calls)
    return evaluate(this, among or ranks(), PROMPTS, general, config, may_stop=False)


def test_reasoning_numbers():
    metrics = run().metrics
    assert metrics["pass_at_1"] == pytest.approx((2 + 1 + 4) / 12)
    deviation = math.sqrt(((0.5 - 7 / 12) ** 2 + (0.25 - 7 / 12) ** 2 + (1 - 7 / 12) ** 2) / 2)
    half = 1.959964 * deviation / math.sqrt(3)
    assert metrics["pass_at_1_ci"] == pytest.approx([7 / 12 - half, min(1, 7 / 12 + half)])
    assert metrics["greedy"] == pytest.approx(2 / 3)
    assert metrics["cons_at_k"] == pytest.approx(2 / 3)  # a by the tie, b not, c
    assert (metrics["k"], metrics["problems"], metrics["samples"], metrics["unscored"]) == (4, 3, 12, 0)
    assert metrics["format_rate"] == pytest.approx(10 / 12)  # one without tags, one cut off
    assert metrics["language_consistency"] == pytest.approx(11 / 12)
    assert metrics["length_mean"] == pytest.approx((4 * 10 + 8 * 20) / 12)
    assert metrics["truncation_rate"] == pytest.approx(1 / 12)


def test_numbers_by_task_and_language():
    metrics = run().metrics
    assert metrics["by_task"]["word"]["pass_at_1"] == pytest.approx(3 / 8)
    assert metrics["by_task"]["word"]["samples"] == 8 and metrics["by_task"]["word"]["greedy"] == 0.5
    assert metrics["by_task"]["countdown"]["pass_at_1"] == 1.0
    assert metrics["by_language"]["zh"]["pass_at_1"] == 0.25 and metrics["by_language"]["en"]["problems"] == 2


def test_general_numbers():
    metrics = run().metrics
    assert metrics["general_by_kind"] == {"writing": 1.0, "facts": 0.5, "identity": None, "translation": None}
    assert metrics["general_score"] == 0.75  # the mean over kinds, not over prompts
    assert metrics["preference_score"] == pytest.approx((0.9 + 0.5 + 0.1) / 3)
    assert metrics["refusal_rate"] == 1.0 and metrics["safe_answer_rate"] == 0.5


def test_without_a_hidden_truth_general_numbers_are_null_and_nothing_is_sampled():
    calls = []
    metrics = run(truth=False, calls=calls).metrics
    names = ("general_score", "preference_score", "refusal_rate", "safe_answer_rate")
    assert all(metrics[name] is None for name in names) and len(calls) == 2
    json.dumps(metrics, allow_nan=False)


def test_two_ranks_give_what_one_gives():
    shares = []
    for rank in range(2):  # the first pass collects what each rank would send

        def collect(local):
            shares.append(local)
            return [local]

        run(among=ranks(rank, 2, collect))
    whole = run()
    for rank in range(2):
        assert run(among=ranks(rank, 2, lambda local: shares)) == whole


def test_passes_draw_from_streams_of_their_own_and_ranks_from_those_of_their_prompts():
    alone, shared = [], []
    run(calls=alone)
    for rank in range(2):
        run(calls=shared, among=ranks(rank, 2))
    alone, shared = [params for params, _ in alone], [params for params, _ in shared]
    assert len({params.seed for params in alone}) == len(alone) == 3
    assert [params.seed for params in shared] == 2 * [params.seed for params in alone]
    assert [(p.first, p.stride) for p in [*alone, *shared]] == 3 * [(0, 1)] + 3 * [(0, 2)] + 3 * [(1, 2)]
    assert [(p.n, p.temperature, p.top_p) for p in alone] == [(4, 0.6, 0.95), (1, 0.0, 1.0), (1, 0.6, 0.95)]


def kept(folder, rank=0, world_size=1):
    """An evaluation with its completions in a folder; how many prompts each call of the sampler had."""
    calls = []
    data = SimpleNamespace(truth=None, strategy_of=None)
    chat = FakeChat()
    chat.template_hash = "t"
    config = SimpleNamespace(weights_from=None)
    this = SimpleNamespace(chat=chat, data=data, seed=lambda stream: 7, shared_progress=lambda *_: None)
    this.config, this.launch, this.sampler = config, SimpleNamespace(check=lambda: None), fake_sampler(calls)
    among = ranks(rank, world_size)
    among.agree_max = lambda count: count
    found = evaluate(this, among, PROMPTS, [], CONFIG, may_stop=False, context=99, folder=folder)
    return found, [(params.n, params.first, count) for params, count in calls]


def test_a_resumed_evaluation_draws_only_what_is_missing(tmp_path):
    folder = tmp_path / "drawn"
    whole, calls = kept(folder)
    assert calls == [(4, 0, 3), (1, 0, 3)] and whole.metrics == run(truth=False).metrics
    assert kept(folder) == (whole, [])
    sampled = next(path for path in folder.iterdir() if len(pq.read_table(path)) == 12)
    sampled.unlink()
    again, calls = kept(folder)
    assert calls == [(4, 0, 3)] and again == whole


def test_ranks_share_the_work_and_another_number_of_them_finds_it(tmp_path):
    folder = tmp_path / "drawn"
    shares = [kept(folder, rank, 2)[1] for rank in range(2)]
    assert shares == [[(4, 0, 2), (1, 0, 2)], [(4, 1, 1), (1, 1, 1)]]
    found, calls = kept(folder)
    assert calls == [] and found.metrics == run(truth=False).metrics


def test_completions_of_other_questions_are_drawn_anew(tmp_path, monkeypatch):
    kept(tmp_path / "drawn")
    changed = [replace(prompt, question=f"{prompt.question}!") for prompt in PROMPTS]
    monkeypatch.setitem(globals(), "PROMPTS", changed)
    assert len(kept(tmp_path / "drawn")[1]) == 2


def test_a_rank_without_prompts_samples_nothing():
    calls = []
    result = run(calls=calls, general=[], among=ranks(5, 6))
    assert (
        [prompts for _, prompts in calls] == [0, 0]
        and result.metrics["pass_at_1"] is None
        and result.metrics["samples"] == 0
    )


def test_a_failed_verdict_is_counted_apart(monkeypatch):
    failing = Checker(
        lambda prompt, summary: Score(0, Status.INFRASTRUCTURE_FAILED),
        lambda prompt: None,
        lambda prompt, summaries: ["x"] * len(summaries),
    )
    monkeypatch.setitem(CHECKERS, "countdown", failing)
    metrics = run().metrics
    assert metrics["pass_at_1"] == pytest.approx(3 / 8)  # not 3 of 12
    assert (metrics["samples"], metrics["unscored"]) == (12, 5)
    assert metrics["by_task"]["countdown"]["pass_at_1"] is None
    assert metrics["cons_at_k"] == 0.5  # of two problems


def test_pass_at_1_divides_by_the_samples_that_were_made():
    """Four samples were asked for; of the second problem one was made, and the third has none at all."""
    made = [Verdict(0, draw, "", 9, draw == 3, draw == 0, 1.0, 1.0, str(draw), None) for draw in range(4)] + [
        Verdict(1, 0, "", 9, False, True, 1.0, 1.0, "1", None)
    ]
    found = summarise(made, [])
    assert found["pass_at_1"] == pytest.approx(2 / 5)  # not 2 of 8, nor of 12
    assert (found["samples"], found["problems"], found["truncation_rate"]) == (5, 2, 1 / 5)


def test_samples_take_tasks_in_turn_and_are_the_same_prompts_every_time():
    samples = run().samples
    assert [row["task"] for row in samples] == ["word", "countdown", "writing"]
    assert samples[0] == {
        "prompt_id": "a",
        "task": "word",
        "language": "en",
        "question": "6*7?",
        "answer": "42",
        "completion": GREEDY["a"][0],
        "tokens": 10,
        "correct": True,
        "truncated": False,
        "corrections": [],
    }


def test_a_sample_has_the_messages_before_its_question(monkeypatch):
    context = (Message("system", "Be brief."),)
    monkeypatch.setitem(globals(), "PROMPTS", [replace(prompt, context=context) for prompt in PROMPTS])
    samples = run().samples
    assert samples[0]["context"] == [{"role": "system", "content": "Be brief."}]
    assert "context" not in samples[2]


def test_strategies_are_shares_of_the_sampled_ones():
    def strategy(prompt, text):
        return "english" if "We" in text else "other"

    assert run(strategy_of=strategy).metrics["strategies"] == {"english": 8 / 12, "other": 4 / 12}
    assert run().metrics["strategies"] == {}


def test_progress_runs_through_all_passes():
    seen = []
    run(progress=lambda what, done, total, unit: seen.append((done, total)))
    assert seen == [(12, 21), (15, 21), (21, 21)]


def test_the_short_evaluation_and_its_metric_names():
    config = short(CONFIG)
    assert (config.split, config.problems, config.samples, config.greedy) == ("dev", 2, 1, False)
    one = run(config=config, general=[]).metrics
    assert one["cons_at_k"] is None and one["greedy"] is None and one["k"] == 1
    lines = logged(run().metrics)
    assert lines["eval/pass_at_1"] == pytest.approx(7 / 12) and lines["eval/word/pass_at_1"] == pytest.approx(
        3 / 8
    )
    assert lines["eval/general_score"] == 0.75
    assert "eval/greedy" not in logged(one) and all(isinstance(value, float) for value in lines.values())


def test_intervals():
    # unequal numbers of samples: p = 3/4, residuals 3 - 3*.75 = .75 and 0 - .75 = -.75
    error = math.sqrt(2 / 1 * (0.75**2 + 0.75**2)) / 4
    assert clustered_interval([[1, 1, 1], [0]]) == pytest.approx([max(0, 0.75 - 1.959964 * error), 1.0])
    assert clustered_interval([]) is None and clustered_interval([[], []]) is None
    assert clustered_interval([[1.0], [0.0], [1.0], [1.0]]) == wilson(0.75, 4)
    assert clustered_interval([[1, 1, 1, 1]] * 20) == wilson(1.0, 20)  # 20 problems, not 80 samples
    assert wilson(0.5, 100) == pytest.approx([0.4038, 0.5962], abs=1e-4)
    assert wilson(0.0, 10) == pytest.approx([0.0, 0.2775], abs=1e-4)


def test_a_cluster_counts_for_less_than_as_many_free_samples():
    clustered = clustered_interval([[1.0] * 4] * 10 + [[0.0] * 4] * 10)
    free = wilson(0.5, 80)
    assert clustered[1] - clustered[0] > 1.9 * (free[1] - free[0])


def test_curves_and_lengths():
    found = run().metrics
    # right: 2 of 4 of a, 1 of b, 4 of c; of two draws all are wrong with chance 1/6 for a and 3/6 for b
    assert found["pass_at_k"] == pytest.approx({"1": 7 / 12, "2": (5 / 6 + 1 / 2 + 1) / 3, "4": 1.0})
    assert list(found["maj_at_k"]) == ["1", "2", "4"]
    assert found["maj_at_k"]["1"] == found["pass_at_1"] and found["maj_at_k"]["4"] == found["cons_at_k"]
    assert (found["lengths"]["median"], found["lengths"]["p95"], found["lengths"]["max"]) == (20, 20, 20)
    assert found["lengths"]["right"] == pytest.approx((2 * 10 + 5 * 20) / 7)
    assert found["lengths"]["wrong"] == pytest.approx((2 * 10 + 3 * 20) / 5)


def test_curves_leave_out_what_has_too_few_scored_samples():
    made = [Verdict(0, n, "", 9, False, n == 0, 1.0, 1.0, str(n), None) for n in range(4)]
    made += [Verdict(1, n, "", 9, False, True if n else None, 1.0, 1.0, "1", None) for n in range(4)]
    found = curves(made, 4)
    assert found["pass_at_k"] == {"1": (1 / 4 + 1) / 2, "2": (1 / 2 + 1) / 2, "4": 1.0}
    assert found["maj_at_k"]["4"] == 1.0  # four different votes: the first, which is right
    assert curves([], 4) == {
        "pass_at_k": {"1": None, "2": None, "4": None},
        "maj_at_k": {"1": None, "2": None, "4": None},
    }


def test_numbers_by_level_and_subject(monkeypatch):
    levels = [replace(prompt, level=n, subject="Algebra" if n else "") for n, prompt in enumerate(PROMPTS)]
    monkeypatch.setitem(globals(), "PROMPTS", levels)
    found = run().metrics
    assert {level: part["pass_at_1"] for level, part in found["by_level"].items()} == {"1": 0.25, "2": 1.0}
    assert found["by_subject"]["Algebra"]["samples"] == 8 and found["by_subject"]["Algebra"]["problems"] == 2
    assert run(truth=False).metrics["by_level"].keys() == {"1", "2"}


def test_pass_at_k_by_hand():
    assert pass_at(10, 0, 5) == 0.0 and pass_at(10, 6, 5) == 1.0 and pass_at(4, 1, 1) == 0.25
    assert pass_at(5, 2, 3) == pytest.approx(1 - 1 / 10)  # one of ten triples has none of the two
    draws = [sum(1 for pick in combinations(range(7), 3) if min(pick) < 2) / 35]
    assert pass_at(7, 2, 3) == pytest.approx(draws[0])


def test_majority_in_blocks_by_hand():
    votes = [("1", True), ("2", False), ("2", False), ("1", True), ("1", True), ("3", False)]
    assert majority_in_blocks(votes, 1) == 0.5
    assert majority_in_blocks(votes, 2) == pytest.approx(2 / 3)  # the first of a tie: 1, 2, 1
    assert majority_in_blocks(votes, 3) == 0.5 and majority_in_blocks(votes, 4) == 1.0
    assert majority_in_blocks(votes, 7) is None
    assert (quantile([3, 1, 2, 4], 0.5), quantile([3, 1, 2, 4], 0.95), quantile([], 0.5)) == (2, 4, None)


def test_every_completion_has_a_row():
    rows = run().completions
    assert [(row["prompt_id"], row["draw"], row["correct"]) for row in rows[:5]] == [
        *(("a", draw, correct) for draw, correct in enumerate((True, False, True, False))),
        ("a", -1, True),
    ]
    assert len(rows) == 15 and rows[5]["truncated"] is False and rows[7]["truncated"] is True
    assert {row["question_hash"] for row in rows[:5]} == {question_hash("6*7?")}


def test_majority():
    assert majority([("1", False), ("2", True), ("2", True)])
    assert majority([("1", True), ("2", False)]) and not majority(
        [("1", False), ("2", True)]
    )  # ties: the first
    assert (
        majority([("", False), ("", False), ("3", True)]) and not majority([("", False)]) and not majority([])
    )
    assert mean([]) is None and mean([1, 2]) == 1.5


def test_as_many_samples_are_shown_as_there_are():
    assert compose(["stage=base", "stage.eval.problems=5"]).config.stage.eval.shown > 5
    assert len(run(config=replace(CONFIG, shown=99)).samples) == len(PROMPTS) + len(GENERAL)


# what `r1pipe eval` measures


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> House:
    return build_house(tmp_path, monkeypatch)


def configs(house: House, stage: str) -> list[dict]:
    return [json.loads((folder / "config.json").read_text()) for folder in house.runs(stage)]


def test_eval_measures_on_the_data_of_the_run(house, capsys):
    own = ["data.tasks=[word,program]", "data.levels=[3]", "data.languages=[zh]", "seed=4"]
    assert house.call("run", "stage=cold_start", *own) == 0
    run_id = house.runs("cold_start")[0].name
    capsys.readouterr()
    assert house.call("eval", run_id) == 0
    trained, measured = configs(house, "cold_start")[0], configs(house, "evaluate")[0]
    assert measured["data"] == trained["data"] and measured["seed"] == trained["seed"] == 4
    assert f"evaluating on data=world, split test, as run {run_id} was" in capsys.readouterr().out


def test_eval_says_which_system_prompt_it_uses(house, capsys):
    assert house.call("run", "stage=cold_start") == 0
    for words, told in ([], None), (["chat.system=Be brief."], "with the system prompt 'Be brief.'"):
        capsys.readouterr()
        assert house.call("eval", "cold_start", *words) == 0
        line = capsys.readouterr().out.splitlines()[0]
        assert told in line if told else "system prompt" not in line


def test_eval_says_how_its_data_differs_from_the_runs(house, tmp_path, capsys):
    house.call("run", "stage=cold_start", "data.levels=[3]", "data.languages=[zh]")
    run_id = house.runs("cold_start")[0].name
    capsys.readouterr()
    assert house.call("eval", run_id, "data.levels=[1,2]", "stage.eval.split=dev") == 0
    data = configs(house, "evaluate")[0]["data"]
    assert (data["levels"], data["languages"]) == ([1, 2], ["zh"])
    said = capsys.readouterr().out
    line = f"evaluating on data=world, split dev; run {run_id} had other data (data.levels: [3] -> [1, 2])"
    assert line in said
    file = tmp_path / "aime24.jsonl"
    file.write_text(json.dumps({"problem": "1 + 1?", "answer": "2"}) + "\n", encoding="utf-8")
    assert house.call("eval", run_id, "data=aime24", f"data.path={file}") == 0
    assert "evaluating on data=aime24" in capsys.readouterr().out


def test_eval_measures_on_the_files_of_the_run(house, tmp_path):
    (tmp_path / "数据").mkdir()
    (tmp_path / "数据" / "r.csv").write_text("a,b,c\n")
    columns = "columns:{question:'a + b',answer:c}"
    rows = f"[{{path:r.csv,{columns},answer_after:'####',language:en,task:my,split:null}}]"
    own = ["data=gsm8k", f"data.path='{tmp_path}/数据'", f"data.reasoning={rows}", "data.bad_rows=set_aside"]
    assert house.call("run", "stage=cold_start", *own) == 0
    assert house.call("eval", "cold_start", "data.max_bad_rows=0.2") == 0
    trained, measured = configs(house, "cold_start")[0]["data"], configs(house, "evaluate")[0]["data"]
    assert measured == trained | {"max_bad_rows": 0.2} and trained["reasoning"][0]["answer_after"] == "####"


def test_problems_that_do_not_fit_are_counted_and_named_on_the_screen(tmp_path):
    rows = [{"question": f"{i} + 1?" * (1 if i % 2 else 500), "answer": str(i + 1)} for i in range(30)]
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = "columns:{question:question,answer:answer}"
    source = f"{{path:sums.jsonl,{columns},answer_after:null,language:en,task:sums,split:test}}"
    words = ["recipe=smoke", "stage=evaluate", "parent=base", "engine.ranks=1", "stage.eval.problems=500"]
    words += ["stage.eval.samples=1", "stage.eval.max_tokens=4", "data=files", f"data.path={file}"]
    config = replace(compose([*words, f"data.reasoning=[{source}]"]).config, weights_from=lineage.bundled())
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_mapping(config)))
    load_stage("evaluate").main(str(folder))
    found = json.loads((folder / "record.json").read_text())["metrics"]
    assert (found["data"], found["split"], found["problems"], found["too_long"]) == ("files", "test", 15, 15)
    said = (folder / "progress.jsonl").read_text()
    assert "15 problems of data=files were measured; 15 prompts are too long" in said
    assert "measured on 15 of the 500 problems requested, data=files, split test" in said
