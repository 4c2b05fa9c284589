"""A benchmark: a data set that is all held out, the prompt it is asked with, how often, and how it is scored.

A file of conf/benchmark/ is the whole of it. `benchmark=NAME` brings the file's protocol into `stage.eval`
and `data`, where the command line can change each value.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from r1pipe.config.fields import Count, NonNegative, Positive, Rules, Share, Strict
from r1pipe.config.stages import EvaluateConfig, StageConfig

QUESTION, OPTIONS = "{question}", "{options}"  # what a prompt puts in place
OWN_SCORING = {  # how r1pipe scores by rule -> what that compares
    "answer": "final answer",
    "choice": "letter",
    "program": "tests",
    "drop": "F1 and exact match",
}
ScoredBy = Literal["answer", "choice", "program", "drop", "lm_eval", "harness", "judge"]
OF_EVALUATION = ("problems", "samples", "temperature", "top_p", "greedy", "max_tokens")  # as in stage.eval
HELD_OUT = "test"  # the split of all its rows


LM_EVAL = "lm_eval/"  # benchmark=lm_eval/TASK


@dataclass
class HarnessConfig(Strict):
    """How a task of lm-evaluation-harness is run."""

    tasks: str | None  # a folder with tasks of your own; null: its own tasks
    chat: bool  # prompts are written with the chat template
    fewshot: Count | None  # examples before each question; null: as the task has it
    think_end_token: str | None  # such as </think>: what follows it is scored
    trust_code: bool  # run what the files of `tasks` name: Python (!function) and metrics, without a sandbox


@dataclass
class BenchmarkConfig(Strict):
    """A benchmark with the protocol of its authors, or of R1 where that has one."""

    name: str  # the file in conf/benchmark/, or lm_eval/TASK
    title: str  # as tables name it
    source: str  # where its data and its prompt are published
    scored_by: ScoredBy  # answer, choice, program, drop: by a rule; else not by r1pipe eval
    data: str | None  # the file in conf/data/ that reads its rows; null: r1pipe reads none
    file: str | None  # its file, where data.path is a folder; null: the first that conf/data names
    prompt: str  # what is asked: {question}, and {options} where they are not to stand in the question
    option: str  # a line of {options}: {letter} and {text}
    command: str | None  # what runs it, where r1pipe eval does not
    harness: HarnessConfig | None  # of lm_eval/TASK
    problems: Count  # as published; of lm_eval/TASK the first so many, 0: all
    samples: Positive  # k completions per problem
    temperature: NonNegative  # of the k completions
    top_p: Share  # of the k completions
    greedy: bool  # one greedy completion besides
    max_tokens: Positive  # longest completion; the model's context may leave less
    ngram: Count  # words in a row that a question and training text share, when copies are looked for; 0: off
    common: Positive  # questions; an n-gram in more of them is their common phrasing, and does not count
    covered: Share  # of a question's words, in such n-grams: from this share on it counts as copied


def apply(mapping: dict[str, Any], own: Collection[str]) -> dict[str, Any]:
    """The values that the benchmark of a composed config gives to other groups, except for keys in `own`.

    `stage.eval` gets its protocol, the answer cut to the model's context; `data.reasoning` its one file, all
    of it held out.
    """
    benchmark, longest = mapping["benchmark"], mapping["model"]["max_position_embeddings"]
    values = {f"stage.eval.{key}": benchmark[key] for key in OF_EVALUATION}
    values["stage.eval.max_tokens"] = min(benchmark["max_tokens"], longest)
    values |= {"stage.eval.split": HELD_OUT, "stage.eval.general": 0}
    data = mapping["data"]
    if benchmark["data"] and data["kind"] == "files":
        values["data.reasoning"] = held_out(data, benchmark["file"])
    values = {key: value for key, value in values.items() if key not in own or key == "data.reasoning"}
    for key, value in values.items():
        *path, last = key.split(".")
        place = mapping
        for part in path:
            place = place[part]
        place[last] = value
    return values


def held_out(data: dict[str, Any], file: str | None) -> list[dict[str, Any]]:
    """The sources of a benchmark, without those that are there to train on: its file's, or all."""
    sources, is_folder = data["reasoning"], bool(data["path"]) and Path(data["path"]).is_dir()
    named = [source for source in sources if source["path"] == file]
    chosen = named or (sources if is_folder else sources[:1])
    return [{**source, "split": HELD_OUT} for source in chosen]


def task_of(benchmark: BenchmarkConfig | None) -> str:
    """The task of lm-evaluation-harness; "" where it is none."""
    if benchmark is None or benchmark.harness is None or not benchmark.name.startswith(LM_EVAL):
        return ""
    return benchmark.name.removeprefix(LM_EVAL)


def benchmark_rules(benchmark: BenchmarkConfig | None, stage: StageConfig) -> Rules:
    if benchmark is None:
        return
    if task_of(benchmark):
        evaluated = getattr(stage, "eval", None)
        for key in ("samples", "temperature", "top_p", "greedy"):
            if getattr(evaluated, key, None) != getattr(benchmark, key):
                yield f"stage.eval.{key} is the task's own in benchmark={benchmark.name}; leave it out"
    elif benchmark.scored_by not in OWN_SCORING:
        how = {"lm_eval": "lm-evaluation-harness", "judge": "a model as judge"}.get(benchmark.scored_by)
        yield (
            f"benchmark={benchmark.name} is scored by {how or 'its own harness'}, not by r1pipe eval; run "
            f"{benchmark.command}"
        )
    if not isinstance(stage, EvaluateConfig):
        yield (
            f"benchmark={benchmark.name} measures, and stage={stage.name} trains; use `r1pipe eval "
            f"CHECKPOINT benchmark={benchmark.name}`"
        )
    if benchmark.prompt.count(QUESTION) != 1 or benchmark.prompt.count(OPTIONS) > 1:
        yield f"benchmark.prompt must hold {QUESTION} once, and {OPTIONS} at most once"
    if benchmark.top_p == 0:
        yield "benchmark.top_p=0 leaves nothing to draw; it must be above 0"
