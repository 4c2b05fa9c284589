"""Asking a checkpoint who it is: fifty questions, and whether it claims to be another model."""

import random
from itertools import chain
from typing import Any

from r1pipe.chat.template import parse
from r1pipe.config import EvalConfig
from r1pipe.core.types import Prompt
from r1pipe.data import identity
from r1pipe.runs import stopping
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.rollout import SamplingParams
from r1pipe.train.run import Run

SHOWN = 3  # claims that are kept in full


def measure(run: Run[Any], ranks: Ranks, config: EvalConfig) -> dict[str, Any] | None:
    """r1pipe.data.identity.score of the sampler's weights, over `config.identity` questions, half of them in
    each language; None without any. All ranks call; each gets the same. Raises Interrupted in all
    of them after a request to stop."""
    if not config.identity:
        return None
    prompts = spread(config.identity)
    mine = range(ranks.rank, len(prompts), ranks.world_size)
    seed = random.Random(f"identity/{run.seed('evaluation')}").getrandbits(31)
    params = SamplingParams(
        *(config.max_tokens, config.temperature, config.top_p, 1, seed, ranks.rank, ranks.world_size),
        max_num_seqs=config.max_num_seqs,
    )

    def progress(done: int, total: int) -> None:
        run.shared_progress("asking who it is", done, len(prompts), "completions")

    drawn: list[tuple[int, str]] = []
    with stopping.leaving_early(ranks):
        tokens = [run.chat.prompt_tokens(prompts[i]) for i in mine]
        completions = run.sampler.generate(tokens, params, progress, stop=stopping.requested)
        drawn = [(i, run.chat.response(one.tokens)) for i, one in zip(mine, completions, strict=True)]
    texts = dict(chain.from_iterable(ranks.all_gather_objects(drawn)))
    answers = [parse(texts[i]).summary or texts[i] for i in range(len(prompts))]
    screening = run.config.screening.identity
    found = identity.score(screening, prompts, answers)
    claims = identity.Claims(screening)
    shown = [
        {"question": prompt.question, "answer": text}
        for prompt, text in zip(prompts, answers, strict=True)
        if claims.found(text)
    ]
    return found | {"claims": shown[:SHOWN]}


def spread(count: int) -> list[Prompt]:
    """Up to `count` questions, the languages in turn."""
    asked = identity.questions()
    by_language = [
        [prompt for prompt in asked if prompt.language == language]
        for language in dict.fromkeys(prompt.language for prompt in asked)
    ]
    return list(chain.from_iterable(zip(*by_language, strict=True)))[:count]
