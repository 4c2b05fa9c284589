"""Feedback: the student answers, and the teacher says what that is worth, or writes it better.

Three kinds: a rating that the teacher writes by a rubric; the likelihood of the answer under the teacher, its
geometric mean per token, which takes no instruction; and a correction.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import pyarrow as pa

from r1pipe.core.types import Completion, Prompt
from r1pipe.data.overlap import user_text
from r1pipe.rewards.accuracy import summary_of
from r1pipe.runs import samples, stopping
from r1pipe.train.answering import LocalAnswerer
from r1pipe.train.extract.dataset import Kept, Steps
from r1pipe.train.extract.reading import likelihoods, read_examples
from r1pipe.train.extract.teacher import GenerationParams, TeacherGenerator
from r1pipe.train.extract.work import Found, Work
from r1pipe.train.loading import load_weights
from r1pipe.train.rollout import SamplingParams
from r1pipe.train.rollout.sampler import Progress
from r1pipe.train.sft.filters import EXAMPLES, EvalQuestions
from r1pipe.train.shards import SHARD_ROUNDS, in_order, in_shards

BEST = 10.0  # the highest rating of the rubric
PER_SHARD = 256  # responses that are read
FEEDBACK = "feedback"  # the name of the teacher's words among its shards
_SCORE = re.compile(r"score[\s*:]*(\d+(?:\.\d+)?)", re.IGNORECASE)
ANSWER = pa.schema([("text", pa.string()), ("finish_reason", pa.string())])
SCORE = pa.schema([("score", pa.float64())])


def feedback(work: Work) -> Found:
    """Scored answers of the student, or corrected ones; for stage.transfer=rl, whose answers are scored as
    they are drawn, the prompts alone."""
    prompts, dropped = without_evaluation(work, work.data_prompts())
    if work.stage.transfer == "rl":
        return Found([Kept(prompt, "", {"licence": prompt.licence}) for prompt in prompts], [])
    answers = students_answers(work, prompts)
    steps: Steps = [
        {
            "name": "overlap with evaluation",
            "kept": len(prompts),
            "dropped": len(dropped),
            "examples": dropped[:EXAMPLES],
        }
    ]
    pairs = [(prompt, one) for prompt, each in zip(prompts, answers, strict=True) for one in each]
    if work.stage.feedback.by == "correction":
        return corrected(work, pairs, steps)
    scores = rated(work.teacher, pairs) if work.stage.feedback.by == "rubric" else by_likelihood(work, pairs)
    return scored(work, pairs, scores, steps)


def without_evaluation(work: Work, prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[str]]:
    """The prompts that are no evaluation questions, and those that are."""
    evaluation = EvalQuestions(work.questions, work.stage.filters.ngram_overlap)
    copies = {prompt.id: prompt.question for prompt in prompts if evaluation.has(user_text(prompt))}
    return [prompt for prompt in prompts if prompt.id not in copies], [*copies.values()]


def students_answers(work: Work, prompts: Sequence[Prompt]) -> list[list[Completion]]:
    """What the student answers before it is trained, `samples_per_prompt` each."""
    run, stage = work.run, work.stage
    sampling, each, parent = stage.sampling, stage.samples_per_prompt, run.config.weights_from
    assert parent is not None, "a student without weights has no answers"
    run.sampler.update(load_weights(run, parent, work.ranks), 0)
    params = SamplingParams(
        sampling.max_tokens,
        sampling.temperature,
        sampling.top_p,
        each,
        run.seed("student"),
        max_num_seqs=sampling.max_num_seqs,
    )

    def draw(part: Sequence[Prompt], number: int, of: int, progress: Progress) -> pa.Table:
        tokens = [run.chat.prompt_tokens(prompt) for prompt in part]
        here = replace(params, first=number, stride=of)
        drawn = run.sampler.generate(tokens, here, progress, stop=stopping.requested)
        texts = [(run.chat.response(one.tokens), one.finish_reason) for one in drawn]
        return pa.Table.from_pylist([dict(zip(ANSWER.names, row, strict=True)) for row in texts], ANSWER)

    def idle() -> None:
        run.sampler.generate([], params, stop=stopping.requested)

    per_shard = max(1, SHARD_ROUNDS * sampling.max_num_seqs // each)
    shards = in_shards(run, work.ranks, "student", prompts, per_shard, draw, idle, each=each)
    run.sampler.forget()
    return [
        [Completion([], [], row["finish_reason"], row["text"]) for row in rows]
        for rows in in_order(shards, each)
    ]


Pairs = Sequence[tuple[Prompt, Completion]]


def rated(teacher: TeacherGenerator, pairs: Pairs) -> list[float | None]:
    """The teacher's ratings, in 0..1; None where none can be read."""
    template, config = teacher.run.stage.templates.rubric, teacher.run.stage.feedback
    requests = [_request(template, *pair) for pair in pairs]
    how = GenerationParams(config.max_tokens, config.temperature, by_content=True)
    replies = teacher.generate(FEEDBACK, requests, how)
    return [rating(summary_of(reply.text)) for [reply] in replies]


def rating(text: str) -> float | None:
    """The last "Score: N" of a text, from 0 to 10, as a share."""
    found = _SCORE.findall(text)
    score = float(found[-1]) if found else None
    return score / BEST if score is not None and score <= BEST else None


def by_likelihood(work: Work, pairs: Pairs) -> list[float | None]:
    """The likelihood of each answer, from shards."""
    teacher = work.teacher.local

    def draw(part: Pairs, number: int, of: int, progress: Progress) -> pa.Table:
        rows = [{"score": score} for score in likelihood_scores(teacher, part)]
        progress(len(part), len(part))
        return pa.Table.from_pylist(rows, SCORE)

    def idle() -> None:
        likelihood_scores(teacher, [])

    shards = in_shards(work.run, work.ranks, FEEDBACK, pairs, PER_SHARD, draw, idle, "responses")
    return [row["score"] for [row] in in_order(shards)]


def likelihood_scores(teacher: LocalAnswerer, pairs: Pairs) -> list[float | None]:
    """exp of the mean log-probability per token, the end of the answer counted; None where it is too long.
    Where weights are sharded all ranks call."""
    examples = [teacher.chat.example(prompt, one.text) for prompt, one in pairs]
    read = read_examples(teacher, examples, likelihoods)
    return [None if found is None else float(np.exp(found[0].mean())) for found in read]


def scored(work: Work, pairs: Pairs, scores: Sequence[float | None], steps: Steps) -> Found:
    """The student's answers with their scores: all of them to be compared, or for SFT the best of each prompt
    that are good enough and pass the filters."""
    judged = {**students(work), "judge": work.teacher.identity.name_and_version}
    drawn = [(prompt, one, score) for (prompt, one), score in zip(pairs, scores, strict=True)]
    with_score = [(prompt, one, score) for prompt, one, score in drawn if score is not None]
    unread = [one.text for _, one, score in drawn if score is None]
    steps = [*steps, _step("no score", len(with_score), unread)]
    if work.stage.transfer != "sft":
        return Found(
            [
                Kept(prompt, one.text, {"licence": prompt.licence, **judged}, (), score)
                for prompt, one, score in with_score
            ],
            steps,
        )
    best: dict[str, float] = {}
    for prompt, _, score in with_score:
        best[prompt.id] = max(best.get(prompt.id, 0.0), score)
    least = work.stage.feedback.min_score
    enough = [(prompt, one) for prompt, one, score in with_score if score >= max(least, best[prompt.id])]
    others = [one.text for prompt, one, score in with_score if score < max(least, best[prompt.id])]
    steps.append(_step("the best, and good enough", len(enough), others))
    rows, funnel, _ = work.kept([prompt for prompt, _ in enough], [[one] for _, one in enough], origin=judged)
    return Found(rows, [*steps, *funnel])


def corrected(work: Work, pairs: Pairs, steps: Steps) -> Found:
    """The teacher's corrections that pass the filters; for a ranking with what they correct, below them."""
    template, config = work.stage.templates.correction, work.stage.feedback
    requests = [_request(template, *pair) for pair in pairs]
    replies = work.teacher.generate(
        FEEDBACK, requests, GenerationParams(config.max_tokens, config.temperature)
    )
    better, changed = [reply for [reply] in replies], []
    for (prompt, one), reply in zip(pairs, better, strict=True):
        if reply.text.strip() != one.text.strip() or work.stage.transfer == "sft":
            changed.append((prompt, one, reply))
    steps = [*steps, _step("nothing changed", len(changed), [""] * (len(pairs) - len(changed)))]
    rows, funnel, kept = work.kept(
        [prompt for prompt, _, _ in changed],
        [[reply] for _, _, reply in changed],
        origin=work.origin(FEEDBACK),
    )
    if work.stage.transfer == "ranking":
        worse = {id(reply): one.text for _, one, reply in changed}  # texts of two corrections may be equal
        own = [worse[id(reply)] for reply in kept]
        rows = list(chain.from_iterable(with_corrected(work, rows, own)))
    return Found(rows, [*steps, *funnel])


def with_corrected(work: Work, rows: Sequence[Kept], own: Sequence[str]) -> Iterator[tuple[Kept, Kept]]:
    """Each correction with the student's own answer, which it is to be preferred to."""
    origin = students(work)
    for number, (row, text) in enumerate(zip(rows, own, strict=True)):
        licensed = {"licence": row.prompt.licence, **origin}
        worse = Kept(row.prompt, text, licensed, score=0.0, pair=number)
        yield replace(row, score=1.0, pair=number), worse


def students(work: Work) -> dict[str, str | None]:
    """Where the student's own answers came from, which have the licences of their prompts."""
    parent = work.run.config.weights_from
    assert parent is not None
    seed = str(work.run.seed("student"))
    return {"source": samples.SAMPLED + parent.run_id, "checkpoint_hash": parent.hash, "seed": seed}


def _request(template: str, prompt: Prompt, answer: Completion) -> Prompt:
    text = template.replace("{question}", user_text(prompt)).replace("{answer}", answer.text)
    return Prompt("", "", "", text)


def _step(name: str, kept: int, dropped: Sequence[str]) -> dict[str, object]:
    return {"name": name, "kept": kept, "dropped": len(dropped), "examples": [*dropped[:EXAMPLES]]}
