"""Format: R1's readable pattern, `<think>` reasoning `</think>` and a summary (R1 section 2.3.1).

Sample, scored 1: "<think>\\n3+4=7\\n</think>\\n\\nThe answer is 7."
"""

from r1pipe.chat.template import SPECIAL_TOKENS, parse
from r1pipe.core.types import Completion, Prompt, Score
from r1pipe.rewards.accuracy import is_verifiable, states_answer


def format_reward(prompt: Prompt, completion: Completion) -> Score:
    """1 for exactly one <think>...</think> at the start, then a summary; 0 otherwise, with the reason.

    Neither part may be empty, nothing may precede <think>, the summary has no tags or special tokens, and for
    a reasoning task it states a final answer. A truncated completion scores 0.
    """
    parsed = parse(completion.text)
    if completion.truncated:
        fault = "cut off"
    elif not parsed.well_formed:
        fault = "not exactly one <think>...</think> at the start with text in it and after it"
    elif any(token in completion.text for token in SPECIAL_TOKENS):
        fault = "a special token in the text"
    elif is_verifiable(prompt) and not states_answer(prompt, parsed.summary):
        fault = "the summary states no final answer"
    else:
        return Score(1.0)
    return Score(0.0, detail=fault)
