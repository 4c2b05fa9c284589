"""Cosine length reward: a right answer earns more the shorter it is, a wrong one loses less the longer it is.

"Demystifying Long Chain-of-Thought Reasoning in LLMs" (Yeo et al., arXiv 2502.03373, section 4.2). It scores
the answer itself, so it replaces `accuracy` (weight 0).
Sample, of 100 tokens at most and conf's values: right after 0 tokens 2, after 50 1.5, wrong after 50 -5.
"""

import math

from r1pipe.config import RewardsConfig
from r1pipe.core.types import Completion, Score, Status


def cosine(
    config: RewardsConfig, max_tokens: int, completion: Completion, accuracy: Score | None
) -> Score | None:
    """From `shortest` at no token to `longest` at max_tokens, on half a cosine; `exceeded` where cut off.

    None where accuracy is: no rule applies to the prompt.
    """
    if accuracy is None or accuracy.status is not Status.SCORED:
        return accuracy
    values = config.cosine
    if completion.truncated or len(completion.tokens) >= max_tokens:
        return Score(values.exceeded, detail="cut off")
    right = accuracy.value == 1.0
    shortest = values.right_shortest if right else values.wrong_shortest
    longest = values.right_longest if right else values.wrong_longest
    # 1 at no token, 0 at max_tokens
    closeness = (1 + math.cos(math.pi * len(completion.tokens) / max_tokens)) / 2
    return Score(longest + (shortest - longest) * closeness)
