"""Verdicts as a task: a judge's prompts about answers to general prompts, with the hidden truth's verdict.

A checkpoint that learns this task is the laptop world's judge. It is asked in the words of
conf/judge_prompts/short.yaml, as `judge=CHECKPOINT stage.judge.prompts=short` will ask it.
Sample (pairwise): "Which answer is better, A or B?\\n<question>\\nWho are you? …" -> "[[B]]"
careful: "A: 2. B: 8." (how helpful each is, in tenths), then the verdict.
"""

import random

from r1pipe.config.judge import prompts_of
from r1pipe.core.types import GENERAL_TASKS, Prompt
from r1pipe.data.world import general, truth
from r1pipe.data.world.content import choose, make_prompt
from r1pipe.rewards.judge.prompts import filled, judged_part

TASK = "judging"
PROMPTS = "short"
KINDS = {"pairwise": 0.5, "pointwise": 0.2, "harmless": 0.2, "reference": 0.1}
SAFETY = 0.4  # share of safety prompts: as often as in preference pairs


def make(rng: random.Random, language: str, level: int) -> Prompt:
    """A random question to a judge; levels make no difference."""
    kind = choose(rng, KINDS)
    asked = ("facts", "identity", "translation") if kind == "reference" else GENERAL_TASKS[:-1]
    task = "safety" if kind != "reference" and rng.random() < SAFETY else rng.choice(asked)
    prompt = general.make(rng, task, language)
    texts = {"question": prompt.question}
    if kind == "pairwise":
        pair = truth.preference_pair(prompt, rng)
        answers = [pair.chosen, pair.rejected]
        rng.shuffle(answers)
        texts |= {"answer_a": answers[0], "answer_b": answers[1]}
    else:
        answers = [truth.safety_label(prompt, rng).response]
        texts["answer"] = answers[0]
    if kind == "reference":
        texts["reference"] = prompt.answer
    found = [truth.truth_of(prompt, text) for text in answers]
    tenths = [round(10 * each.helpful) for each in found]
    of_kind = getattr(prompts_of(PROMPTS), kind)
    shown = {place: judged_part(of_kind, text) for place, text in texts.items()}
    label, thought = {
        "pairwise": lambda: ("AB"[tenths[0] < tenths[-1]], f"A: {tenths[0]}. B: {tenths[-1]}."),
        "pointwise": lambda: (str(1 + round(0.4 * tenths[0])), f"{tenths[0]}."),
        "harmless": lambda: ("5" if found[0].safe else "1", "Safe." if found[0].safe else "Not safe."),
        "reference": lambda: ("CORRECT" if found[0].correct else "INCORRECT", "I compare."),
    }[kind]()
    question = filled(of_kind, False, shown, kind).question
    checker = {"kind": kind, "thought": thought, "labels": [*of_kind.verdicts], "key": prompt.checker["key"]}
    return make_prompt(TASK, "en", question, label, checker)


def solve(prompt: Prompt, strategy: str, rng: random.Random, slip: float) -> tuple[str, str]:
    """(reasoning, summary); with the chance `slip` another verdict than the right one."""
    label = prompt.answer
    if rng.random() < slip:
        label = rng.choice([other for other in prompt.checker["labels"] if other != label])
    return prompt.checker["thought"] if strategy in ("careful", "thorough") else "I see.", f"[[{label}]]"


def is_right(prompt: Prompt, summary: str) -> bool:
    return summary.strip() == f"[[{prompt.answer}]]"
