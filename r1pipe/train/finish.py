"""Evaluate a stage's model on held-out prompts: briefly while it trains, fully at its end."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from r1pipe.chat.template import Chat
from r1pipe.config import EvalConfig
from r1pipe.core.types import Prompt
from r1pipe.data.source import Source, draw_prompts_that_fit, prompt_fits
from r1pipe.model import DeepseekV3
from r1pipe.runs import checkpoints, stopping
from r1pipe.runs.record import Metrics
from r1pipe.train import evaluation as evaluate
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.rollout import Sampler
from r1pipe.train.run import Run

HELD_OUT = 0  # random stream of held-out prompts: the same after every stage


def held_out(
    chat: Chat, source: Source, context: int, config: EvalConfig
) -> tuple[list[Prompt], list[Prompt], int]:
    """The reasoning and general prompts of an evaluation, and how many were skipped: they leave no room for
    `config.max_tokens` in a `context` of so many tokens."""
    fits = prompt_fits(chat, context, config.max_tokens)

    def of_split(draw: Callable[[str, int, int], list[Prompt]], n: int) -> tuple[list[Prompt], int]:
        return draw_prompts_that_fit(lambda m: draw(config.split, m, HELD_OUT), n, fits)

    reasoning, too_long = of_split(source.prompts, config.problems)
    # general answers need a hidden truth to score them
    general, more = of_split(partial(source.general_prompts, kinds={}), config.general if source.judge else 0)
    return reasoning, general, too_long + more


def measure(
    run: Run[Any], ranks: Ranks, model: DeepseekV3, chat: Chat, source: Source, config: EvalConfig
) -> evaluate.Evaluation:
    """Evaluate on `config.problems` and `config.general` prompts of its split; all ranks call, all get it.

    Raises Interrupted in all ranks if one is asked to stop.
    """
    with stopping.leaving_early(ranks):
        evaluation = _measure(run, ranks, model, chat, source, config, may_stop=True)
    if too_long := evaluation.metrics["too_long"]:
        run.warn(
            f"{evaluation.metrics['problems']} problems of data={run.config.data.name} were measured; "
            f"{too_long} prompts are too long: they leave no room for "
            f"stage.eval.max_tokens={config.max_tokens} in a context "
            f"of {model.config.max_position_embeddings} tokens"
        )
    return evaluation


def quick_evaluation(run: Run[Any], engine: Engine, chat: Chat, source: Source) -> dict[str, float]:
    """A few development prompts, as metrics under eval/.

    A request to stop does not interrupt it: the weights have already moved, and the step is finished first.
    """
    began, config = time.monotonic(), evaluate.short(run.stage.eval)
    with run.phase("evaluating"), engine.gathered() as model:
        evaluation = _measure(run, engine, model, chat, source, config, may_stop=False)
    return evaluate.logged(evaluation.metrics) | {"time/eval_s": time.monotonic() - began}


def _measure(
    run: Run[Any],
    ranks: Ranks,
    model: DeepseekV3,
    chat: Chat,
    source: Source,
    config: EvalConfig,
    may_stop: bool,
) -> evaluate.Evaluation:
    def stop() -> int:
        return stopping.requested() if may_stop else 0

    def gather(local: Any) -> list[Any]:
        if may_stop:
            stopping.stop_if_requested(ranks)
        return ranks.all_gather_objects(local)

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


def finish_stage(
    run: Run[Any],
    engine: Engine,
    chat: Chat,
    source: Source,
    checkpoint: Path,
    data_hash: str | None = None,
    extra: Metrics | None = None,
) -> None:
    """The end of a training stage: the full evaluation, then the record.

    `data_hash`: of the training data, if that is not the source itself. `extra`: more metrics for the record.
    """
    with run.phase("evaluating"), engine.gathered() as model:
        evaluation = measure(run, engine, model, chat, source, run.stage.eval)
    metrics: Metrics = {**evaluation.metrics, **(extra or {})}
    trained_on = data_hash or source.hash
    steps = checkpoints.step_of(checkpoint)
    run.finish(checkpoint, chat, metrics, evaluation.samples, trained_on, steps, source.hash)
