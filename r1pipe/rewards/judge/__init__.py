"""A generative judge: quoting prompts, verdicts read strictly, votes in both orders, a cache.

Who answers is an `Answerer` that is passed in: a checkpoint, a Hugging Face folder, or a server.
"""

from r1pipe.rewards.judge.judging import Judge, Preference, Rating
from r1pipe.rewards.judge.reward import JudgeReward, on_unit_scale

__all__ = ["Judge", "JudgeReward", "Preference", "Rating", "on_unit_scale"]
