"""Soft overlong punishment: the last tokens before the limit cost ever more (DAPO, arXiv 2503.14476, eq. 13).

Sample, of 100 tokens at most and a cache of 0.2: 80 tokens earn 0, 90 earn -0.5, 100 or a cut -1.
"""

from r1pipe.config import RewardsConfig
from r1pipe.core.types import Completion, Score


def overlong(config: RewardsConfig, max_tokens: int, completion: Completion, accuracy: Score | None) -> Score:
    """0 up to (1 - overlong_cache) * max_tokens tokens, then falling to -1 at max_tokens."""
    if completion.truncated or len(completion.tokens) >= max_tokens:
        return Score(-1.0, detail="cut off")
    cache = config.overlong_cache * max_tokens
    over = len(completion.tokens) - (max_tokens - cache)
    return Score(-over / cache if over > 0 else 0.0)
