"""What every sampler in this process checks: what it is asked for, and what it has drawn."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from r1pipe.core.errors import ConfigError, NumericProblem
from r1pipe.model import Policy
from r1pipe.model.finite import first_non_finite, not_finite
from r1pipe.train.rollout.drawing import SamplingParams


def checked_limits(
    model: Policy, prompts: Sequence[list[int]], params: SamplingParams, limits: Sequence[int] | None
) -> list[int]:
    """The most tokens of each prompt's completions. Raises ConfigError where the model cannot read so many,
    or a prompt has a token that is not the model's."""
    longest, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    each_limit = [params.max_tokens] * len(prompts) if limits is None else list(limits)
    for index, (prompt, limit) in enumerate(zip(prompts, each_limit, strict=True)):
        if not 0 < len(prompt) <= longest - limit:
            raise ConfigError(
                f"prompt {index} has {len(prompt)} tokens; with max_tokens={limit} it needs"
                f" between 1 and {longest - limit} (model.max_position_embeddings={longest})"
            )
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise ConfigError(
                f"prompt {index} has a token outside the vocabulary (model.vocab_size={vocabulary});"
                " use this model's own tokenizer"
            )
    return each_limit


def checked_stops(model: Policy, params: SamplingParams, eos_id: int | tuple[int, ...] | None) -> set[int]:
    """The tokens that end a completion. Raises ConfigError for one that is not the model's."""
    stops = set(params.stop_token_ids)
    if not params.ignore_eos:
        ends = model.eos_ids if eos_id is None else eos_id
        stops |= {ends} if isinstance(ends, int) else {*ends}
    vocabulary = model.config.vocab_size
    if any(not 0 <= token < vocabulary for token in stops):
        raise ConfigError(
            f"sampling: stop tokens {sorted(stops)} must be below model.vocab_size={vocabulary}"
        )
    return stops


def check_drawn(
    model: Policy, prompt: list[int], tokens: list[int], logprobs: Sequence[float] | np.ndarray
) -> None:
    """Raises NumericProblem, which names the layer, where a drawn token has no probability."""
    if np.isfinite(logprobs).all():
        return
    read = torch.tensor([prompt + tokens], device=model.lm_head.weight.device)
    problem = not_finite("a drawn token's probability", first_non_finite(model, partial(model, read)))
    raise NumericProblem(
        f"{problem}; lower stage.optim.lr, or start from an "
        "earlier checkpoint if the weights are damaged; nothing of this step was saved"
    )
