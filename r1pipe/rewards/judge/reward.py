"""A judge's ratings as rewards in 0..1, for completions that no rule can verify."""

from collections.abc import Mapping, Sequence

from r1pipe.chat.template import parse
from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.types import Completion, Prompt, Score, Status
from r1pipe.rewards.judge.judging import Judge

NOT_JUDGED = "cut off, or no summary to judge"
KINDS = {"judge": "pointwise", "judge_harmless": "harmless"}  # reward -> the prompt it comes from


def on_unit_scale(value: float, verdicts: Mapping[str, float]) -> float:
    """A rating between the prompt's lowest and highest, as 0..1."""
    low, high = min(verdicts.values()), max(verdicts.values())
    return (value - low) / (high - low)


class JudgeReward:
    """The reward `judge` (helpful) or `judge_harmless` of completions, many at a time."""

    def __init__(self, judge: Judge, name: str):
        self.judge, self.kind = judge, KINDS[name]

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Score]:
        """0, unasked, for what is cut off or malformed. VERIFIER_FAILED where no verdict could be read;
        INFRASTRUCTURE_FAILED, all of them, where the judge's server is lost."""
        scores = [Score(0.0, detail=NOT_JUDGED)] * len(completions)
        asked = [
            i
            for i, completion in enumerate(completions)
            if not completion.truncated and parse(completion.text).well_formed
        ]
        try:
            ratings = self.judge.rate([(prompts[i], completions[i].text) for i in asked], self.kind)
        except EnvironmentProblem as problem:
            for i in asked:
                scores[i] = Score(0.0, Status.INFRASTRUCTURE_FAILED, str(problem))
            return scores
        verdicts = getattr(self.judge.prompts, self.kind).verdicts
        for i, rating in zip(asked, ratings, strict=True):
            if rating.value is None:
                scores[i] = Score(0.0, Status.VERIFIER_FAILED, "the judge's verdict cannot be read")
            else:
                detail = f"{self.kind} {rating.value:.2f}"
                scores[i] = Score(on_unit_scale(rating.value, verdicts), detail=detail)
        return scores
