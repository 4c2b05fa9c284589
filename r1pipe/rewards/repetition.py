"""Repetition penalty: tokens of n-grams that the completion has had before.

"Demystifying Long Chain-of-Thought Reasoning in LLMs" (Yeo et al., arXiv 2502.03373): every token of a
repeated n-gram is punished. Theirs is a penalty per token; GRPO has one reward for a completion, so this is
the share of punished tokens, and its weight says how much that costs.
Sample, n = 2: the tokens 1 2 1 2 hold the pair 1 2 twice, so 2 of 4 tokens repeat: -0.5.
"""

from r1pipe.config import RewardsConfig
from r1pipe.core.types import Completion, Score


def repetition(
    config: RewardsConfig, max_tokens: int, completion: Completion, accuracy: Score | None
) -> Score:
    """Minus the share of tokens in an n-gram that occurred before; 0 for a short completion."""
    tokens = completion.tokens
    return Score(-repeated(tokens, config.repetition_ngram) / len(tokens) if tokens else 0.0)


def repeated(tokens: list[int], n: int) -> int:
    """How many tokens are part of an n-gram that had occurred before."""
    seen: set[tuple[int, ...]] = set()
    count, counted_to = 0, 0
    for start in range(len(tokens) - n + 1):
        gram = tuple(tokens[start : start + n])
        if gram in seen:
            count += start + n - max(start, counted_to)
            counted_to = start + n
        seen.add(gram)
    return count
