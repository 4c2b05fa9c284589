"""What every sampler checks: what it is asked for, and, in this process, what it has drawn."""

from collections.abc import Collection, Sequence
from functools import partial

import numpy as np
import torch

from r1pipe.core.errors import ConfigError, NumericProblem
from r1pipe.model import Policy
from r1pipe.model.finite import first_non_finite, not_finite
from r1pipe.train.rollout.drawing import SamplingParams


def checked_limits(
    longest: int,
    vocabulary: int,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    limits: Sequence[int] | None,
) -> list[int]:
    """The most tokens of each prompt's completions, for a model that reads `longest` tokens of `vocabulary`.

    Raises ConfigError where it cannot read so many, or a prompt has a token that is not its own.
    """
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


def checked_stops(vocabulary: int, params: SamplingParams, ends: Collection[int]) -> set[int]:
    """The tokens that end a completion; `ends`: the model's. Raises ConfigError for one it does not have."""
    stops = {*params.stop_token_ids, *(() if params.ignore_eos else ends)}
    if any(not 0 <= token < vocabulary for token in stops):
        raise ConfigError(
            f"sampling: stop tokens {sorted(stops)} must be below model.vocab_size={vocabulary}"
        )
    return stops


def check_drawn(
    model: Policy, prompt: list[int], tokens: list[int], logprobs: np.ndarray | Sequence[float]
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
