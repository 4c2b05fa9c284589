"""Draw -> score -> gather over ranks -> numbers."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from r1pipe.config import EvalConfig
from r1pipe.core.reflection import corrections
from r1pipe.core.types import Prompt
from r1pipe.rewards import Verdicts
from r1pipe.runs import stopping
from r1pipe.runs.record import Metrics
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.evaluation.metrics import measure, measure_general
from r1pipe.train.evaluation.sampling import EvalSampler
from r1pipe.train.evaluation.verdicts import GeneralVerdict, Verdict, rows, score
from r1pipe.train.refusals import refusals
from r1pipe.train.rollout.sampler import never
from r1pipe.train.run import Run


class Evaluation(NamedTuple):
    """The content of evaluation.json, samples.json and evaluation.parquet."""

    metrics: Metrics
    samples: list[dict[str, Any]]
    completions: list[dict[str, Any]]


def evaluate(
    run: Run[Any],
    ranks: Ranks,
    prompts: Sequence[Prompt],
    general_prompts: Sequence[Prompt],
    config: EvalConfig,
    may_stop: bool,
    harder: Sequence[Prompt] = (),
    context: int | None = None,
    folder: Path | None = None,
) -> Evaluation:
    """Measure the sampler's weights on held-out prompts; every rank gets the same result.

    Reasoning prompts are sampled `config.samples` times and once greedily, general ones once. `harder`:
    problems above `data.levels`, sampled as often. `context`: the tokens that the model reads, where a
    completion may go on to their end, up to `config.max_tokens`; None: every prompt has room for so many.
    `folder`: where completions are kept, so that a resumed run draws none of them again. With `may_stop` it
    raises Interrupted in all ranks if one is asked to stop.
    """
    truth_of, strategy_of = run.data.truth, run.data.strategy_of
    general_prompts = general_prompts if truth_of else []
    total = (
        len(prompts) * (config.samples + config.greedy) + len(harder) * config.samples + len(general_prompts)
    )
    stop = stopping.requested if may_stop else never
    hot = config.temperature, config.top_p
    with Verdicts() as verdicts:
        drawing = EvalSampler(run, ranks, config, verdicts, stop, total, context, folder)
        warm = drawing.draw(prompts, config.samples, 0, *hot)
        likeliest = drawing.draw(prompts, 1, 1, 0.0, 1.0) if config.greedy else ((), [])
        asked, texts = drawing.draw(general_prompts, 1, 2, *hot) if general_prompts else ((), [])
        above = drawing.draw(harder, config.samples, 3, *hot) if harder else ((), [])
        sampled = score(prompts, *warm, verdicts, strategy_of)
        greedy = score(prompts, *likeliest, verdicts, None)
        hardest = score(harder, *above, verdicts, strategy_of)
    general = []
    if truth_of:
        for i, completion in zip(asked, texts, strict=True):
            truth = truth_of(general_prompts[i], completion.text)
            said = completion.text, len(completion.tokens), completion.truncated
            general.append(GeneralVerdict(i, *said, truth))
    if may_stop:
        stopping.stop_if_requested(ranks)
    shares = ranks.all_gather_objects((sampled, greedy, general, hardest))
    parts = (sorted(row for share in shares for row in share[j]) for j in range(4))
    sampled, greedy, general, hardest = parts
    metrics = measure(prompts, sampled, greedy, config, (harder, hardest))
    metrics |= measure_general(general_prompts, general)
    metrics["refusals"] = refusals([(general_prompts[row.problem], row.truth) for row in general])
    shown = _shown(prompts, greedy or sampled, general_prompts, general, config.shown)
    return Evaluation(metrics, shown, rows(prompts, sampled, greedy))


def short(config: EvalConfig) -> EvalConfig:
    """The quick evaluation during training: one sample each of a few development problems."""
    few = {"problems": config.every_problems, "harder": min(config.harder, config.every_problems)}
    return dataclasses.replace(config, split="dev", samples=1, greedy=False, general=0, **few)


def _shown(
    prompts: Sequence[Prompt],
    verdicts: list[Verdict],
    general_prompts: Sequence[Prompt],
    general: list[GeneralVerdict],
    n: int,
) -> list[dict[str, Any]]:
    """The first completion of n prompts, alternating tasks: the same prompts after every stage."""
    turns: dict[str, list[dict[str, Any]]] = defaultdict(list)
    first: list[tuple[Prompt, Verdict | GeneralVerdict, bool | None]] = []
    first += [(prompts[v.problem], v, v.correct) for v in verdicts if v.draw == 0]
    first += [(general_prompts[v.problem], v, v.truth.correct) for v in general]
    for prompt, verdict, correct in first:
        row: dict[str, Any] = {"prompt_id": prompt.id, "task": prompt.task, "language": prompt.language}
        if prompt.context:
            row["context"] = [dataclasses.asdict(message) for message in prompt.context]
        row |= {"question": prompt.question, "answer": prompt.answer}
        said = {"completion": verdict.text, "tokens": verdict.length, "truncated": verdict.truncated}
        mended = {"corrections": corrections(verdict.text, prompt.checker)}
        turns[prompt.task].append(row | said | {"correct": correct} | mended)
    rounds = range(max(map(len, turns.values()), default=0))
    return [rows[i] for i in rounds for rows in turns.values() if i < len(rows)][:n]
