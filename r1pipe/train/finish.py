"""Measuring a stage's model on held-out prompts: briefly while it trains, wholly at its end."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from r1pipe.chat.template import Chat
from r1pipe.config import EvalConfig
from r1pipe.core.types import Prompt
from r1pipe.data.fitting import draw_prompts_that_fit, prompt_fits
from r1pipe.data.source import Source
from r1pipe.model import DeepseekV3
from r1pipe.runs import stopping
from r1pipe.runs.record import Metrics
from r1pipe.train import evaluation as evaluate
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.rollout import Sampler
from r1pipe.train.run import Run

HELD_OUT = 0  # the stream that held-out prompts are drawn from: the same ones after every stage


def held_out(
    chat: Chat, source: Source, context: int, config: EvalConfig
) -> tuple[list[Prompt], list[Prompt], int]:
    """The reasoning and the general prompts that a stage is measured on, and how many were skipped: in a
    `context` of so many tokens they leave no room for `config.max_tokens`."""
    fits = prompt_fits(chat, context, config.max_tokens)

    def of_split(draw: Callable[[str, int, int], list[Prompt]], n: int) -> tuple[list[Prompt], int]:
        return draw_prompts_that_fit(lambda m: draw(config.split, m, HELD_OUT), n, fits)

    reasoning, too_long = of_split(source.prompts, config.problems)
    # without a hidden truth nobody could judge a general answer
    general, more = of_split(partial(source.general_prompts, kinds={}), config.general if source.judge else 0)
    return reasoning, general, too_long + more


def measure(
    run: Run[Any], ranks: Ranks, model: DeepseekV3, chat: Chat, source: Source, config: EvalConfig
) -> evaluate.Evaluation:
    """Evaluate on `config.problems` and `config.general` prompts of its split; all ranks call, all get it.

    Raises Interrupted in all ranks where one is asked to stop.
    """

    def gather(mine: Any) -> list[Any]:
        stopping.stop_if_requested(ranks)
        return ranks.all_gather_objects(mine)

    with stopping.leaving_early(ranks):
        evaluation = _measure(run, ranks, model, chat, source, config, gather, stopping.requested)
    if too_long := evaluation.metrics["too_long"]:
        run.warn(
            f"{evaluation.metrics['problems']} problems of data={run.config.data.name} were measured; "
            f"{too_long} prompts are too long: they leave no room for "
            f"stage.eval.max_tokens={config.max_tokens} in a context "
            f"of {model.config.max_position_embeddings} tokens"
        )
    return evaluation


def _measure(
    run: Run[Any],
    ranks: Ranks,
    model: DeepseekV3,
    chat: Chat,
    source: Source,
    config: EvalConfig,
    gather: Callable[[Any], list[Any]],
    stop: Callable[[], object],
) -> evaluate.Evaluation:
    model.eval()
    sampler = Sampler(model, chat.eos_id, chat.pad_id, config.max_num_seqs, run.config.engine.graphs, stop)
    context = model.config.max_position_embeddings
    prompts, general_prompts, too_long = held_out(chat, source, context, config)
    evaluation = evaluate.evaluate(
        sampler.generate,
        chat,
        prompts,
        general_prompts,
        config,
        judge=source.judge,
        seed=run.seed("evaluation"),
        rank=ranks.rank,
        world_size=ranks.world_size,
        gather=gather,
        strategy_of=source.strategy_of,
        progress=lambda done, total: run.progress("evaluating", done, total, "completions"),
    )
    measured: Metrics = {"data": run.config.data.name, "split": config.split, "too_long": too_long}
    evaluation.metrics.update(measured)
    return evaluation


def quick_evaluation(run: Run[Any], engine: Engine, chat: Chat, source: Source) -> dict[str, float]:
    """A few development prompts, as metrics under eval/.

    It runs to its end even where the ranks are asked to stop: the step that it belongs to has moved the
    weights already, and is finished and saved with it.
    """
    began, config, gather = time.monotonic(), evaluate.short(run.stage.eval), engine.all_gather_objects
    with run.phase("evaluating"), engine.gathered() as model:
        evaluation = _measure(run, engine, model, chat, source, config, gather, stop=lambda: False)
    return evaluate.logged(evaluation.metrics) | {"time/eval_s": time.monotonic() - began}


def finish_stage(
    run: Run[Any],
    engine: Engine,
    chat: Chat,
    source: Source,
    checkpoint: Path,
    steps: int,
    data_hash: str | None = None,
    known: Metrics | None = None,
) -> None:
    """The end of a stage that trained: the whole evaluation, then the record.

    `data_hash` is that of what was trained on, where it is not the source itself; `known` goes into the
    record beside what is measured.
    """
    with run.phase("evaluating"), engine.gathered() as model:
        evaluation = measure(run, engine, model, chat, source, run.stage.eval)
    metrics: Metrics = {**evaluation.metrics, **known} if known else evaluation.metrics
    trained_on = data_hash or source.hash
    run.finish(checkpoint, chat, metrics, evaluation.samples, trained_on, steps, source.hash)
