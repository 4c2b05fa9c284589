"""General samples that a judge approves of, where no rule can (R1 section 2.3.3).

R1 gave ground truth and answer to V3. So does this where a prompt has a reference answer; elsewhere the judge
rates the answer by a rubric. What the other filters drop is not judged.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from r1pipe.config import RejectionConfig
from r1pipe.core.types import Prompt, Score
from r1pipe.data.source import draw_prompts_that_fit, prompt_fits
from r1pipe.rewards.judge.judging import Judge
from r1pipe.runs.judge_quality import POINTWISE, REFERENCE
from r1pipe.train.run import Run
from r1pipe.train.sft.filters import FILTERS, Sampled, apply_filters

FIRST_FILTER = "correct"  # of apply_filters: here the judge has the last word
JUDGED_FILTERS = (*(name for name in FILTERS if name != FIRST_FILTER), "judge")


@dataclass(frozen=True)
class Approved:
    """The samples that the judge approves of, and the funnel of what was dropped before."""

    samples: list[Sampled]
    funnel: list[dict[str, Any]]
    judge: str


def general_prompts(run: Run[RejectionConfig]) -> list[Prompt]:
    """The general prompts that are sampled for the judge."""
    stage, source = run.stage, run.data
    assert stage.judge is not None
    prompts, too_long = draw_prompts_that_fit(
        lambda n: source.general_prompts("train", n, run.seed("general prompts"), stage.general_kinds),
        stage.judge.general_prompts,
        prompt_fits(run.chat, run.config.model.max_position_embeddings, stage.sampling.max_tokens),
    )
    if not prompts:
        run.warn(
            f"data={run.config.data.name} has no general prompts for the judge ({too_long} are too long)"
        )
    return prompts


def kinds_of(prompts: Sequence[Prompt]) -> list[str]:
    """The kinds of questions that the judge is asked about answers to these prompts."""
    return sorted({REFERENCE if prompt.answer else POINTWISE for prompt in prompts})


def approved(
    run: Run[RejectionConfig], judge: Judge, samples: Sequence[Sampled], questions: Sequence[str]
) -> Approved:
    """The samples that pass the filters and that the judge approves of."""
    stage = run.stage
    assert stage.judge is not None
    for sample in samples:
        sample.scores["accuracy"] = Score(1.0)
    left, steps = apply_filters(samples, stage.filters, questions)
    verdicts: dict[int, float | None] = {}
    bounds = {REFERENCE: 0.5, POINTWISE: stage.judge.min_score}
    for kind, bound in bounds.items():
        places = [i for i, sample in enumerate(left) if (kind == REFERENCE) == bool(sample.prompt.answer)]

        def progress(done: int, total: int) -> None:
            run.progress("judging", done, total, "answers")

        rows = [(left[i].prompt, left[i].completion.text) for i in places]
        ratings = judge.rate(rows, kind, progress)
        for i, rating in zip(places, ratings, strict=True):
            verdicts[i] = None if rating.value is None else rating.value - bound
    passes = [_passes(verdicts[i], sample.prompt) for i, sample in enumerate(left)]
    kept = [sample for sample, good in zip(left, passes, strict=True) if good]
    dropped = [sample.completion.text for sample, good in zip(left, passes, strict=True) if not good]
    unread = sum(value is None for value in verdicts.values())
    funnel = [{"name": "general: drawn", "kept": len(samples), "dropped": 0}]
    funnel += [{**step, "name": f"general: {step['name']}"} for step in steps if step["name"] != FIRST_FILTER]
    funnel.append(
        {
            "name": f"general: judge ({unread} verdicts could not be read)",
            "kept": len(kept),
            "dropped": len(dropped),
            "examples": dropped[:3],
        }
    )
    return Approved(kept, funnel, judge.identity.name_and_version)


def _passes(above: float | None, prompt: Prompt) -> bool:
    """Whether a verdict is high enough: strictly above a half for a reference, at least the bound else."""
    return above is not None and (above > 0 if prompt.answer else above >= 0)
