"""Evaluate a stage's model on held-out prompts: briefly while it trains, fully at its end."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from r1pipe.config import BenchmarkConfig, EvalConfig
from r1pipe.core.types import Prompt
from r1pipe.data.overlap import user_text
from r1pipe.data.source import draw_prompts_that_fit, prompt_fits
from r1pipe.runs import checkpoints, heartbeat, stopping
from r1pipe.runs.files import write_json
from r1pipe.runs.record import Metrics
from r1pipe.train import evaluation as evaluate
from r1pipe.train import identity
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.evaluation import contamination
from r1pipe.train.evaluation.benchmark_prompt import with_benchmark_prompt
from r1pipe.train.evaluation.verdicts import write
from r1pipe.train.rollout import Weights
from r1pipe.train.run import Run

HELD_OUT = 0  # random stream of held-out prompts: the same after every stage


class HeldOut(NamedTuple):
    """The prompts of an evaluation, and how many were too long for the context."""

    reasoning: list[Prompt]
    harder: list[Prompt]  # above `data.levels`
    general: list[Prompt]
    too_long: int


def held_out(run: Run[Any], context: int, config: EvalConfig) -> HeldOut:
    """The prompts of an evaluation that fit `context` tokens with their answers.

    A benchmark's are asked as its prompt says; their answers have what they leave of the context.
    """
    source, benchmark = run.data, run.config.benchmark
    fits = prompt_fits(run.chat, context, 1 if benchmark else config.max_tokens)

    def problems(split: str, n: int, seed: int) -> list[Prompt]:
        found = source.prompts(split, n, seed)
        return [with_benchmark_prompt(prompt, benchmark) for prompt in found] if benchmark else found

    def of_split(draw: Callable[[str, int, int], list[Prompt]], n: int) -> tuple[list[Prompt], int]:
        return draw_prompts_that_fit(lambda m: draw(config.split, m, HELD_OUT), n, fits)

    reasoning, too_long = of_split(problems, config.problems)
    # general answers need a hidden truth to score them
    general, more = of_split(partial(source.general_prompts, kinds={}), config.general if source.truth else 0)
    harder, most = [], 0
    if config.harder:
        found = source.harder_prompts(config.split, config.harder, HELD_OUT)
        harder = [prompt for prompt in found if fits(prompt)]
        most = len(found) - len(harder)
    return HeldOut(reasoning, harder, general, too_long + more + most)


def measure(
    run: Run[Any], ranks: Ranks, weights: Weights, version: int, config: EvalConfig, quick: bool = False
) -> evaluate.Evaluation:
    """Evaluate weights, which step `version` made; all ranks call, all get it.

    Raises Interrupted in all ranks if one is asked to stop; a `quick` one is not interrupted, and does not
    warn of prompts that are too long.
    """
    run.sampler.update(weights, version)
    context = run.config.model.max_position_embeddings
    with nullcontext() if quick else stopping.leaving_early(ranks):
        prompts, harder, general_prompts, too_long = held_out(run, context, config)
        is_long = run.config.benchmark is not None
        room, folder = (context, run.folder.drawn) if is_long else (None, None)
        evaluation = evaluate.evaluate(
            run, ranks, prompts, general_prompts, config, not quick, harder, context=room, folder=folder
        )
    if not quick:
        note_evaluated(run, [*prompts, *harder], general_prompts)
        if said := identity.measure(run, ranks, config):
            evaluation.metrics["identity"] = said
    measured: Metrics = {"data": run.config.data.name, "split": config.split, "too_long": too_long}
    evaluation.metrics.update(measured | protocol(run, config))
    if run.config.benchmark and not quick:
        search_for_copies(run, run.config.benchmark, config, evaluation.metrics)
    if run.rank == 0 and not quick:
        run.launch.check()
        write(run.folder.completions, evaluation.completions)
    if too_long and not quick:
        wanted = "an answer" if is_long else f"stage.eval.max_tokens={config.max_tokens}"
        run.warn(
            f"{evaluation.metrics['problems']} problems of data={run.config.data.name} were measured; "
            f"{too_long} prompts are too long: they leave no room for {wanted} in a context of {context} "
            "tokens"
        )
    return evaluation


def search_for_copies(
    run: Run[Any], benchmark: BenchmarkConfig, config: EvalConfig, metrics: Metrics
) -> None:
    """Look for the questions in the checkpoint's training data; rank 0 does, and says what it found."""
    start = run.config.weights_from
    if run.rank != 0 or not benchmark.ngram or start is None:
        return
    with heartbeat.at("searching for copies"):
        prompts = run.data.prompts(config.split, config.problems, HELD_OUT)
        questions = [user_text(prompt) for prompt in prompts]
        found = contamination.search(questions, start, benchmark)
        metrics["contamination"], line = contamination.measured(found, questions, benchmark)
    run.show(say=line)


def protocol(run: Run[Any], config: EvalConfig) -> Metrics:
    """Which benchmark was measured, and how it was asked."""
    benchmark = run.config.benchmark
    if benchmark is None:
        return {}
    asked = {"prompt": benchmark.prompt, "seed": run.config.seed, "samples": config.samples}
    asked |= {"temperature": config.temperature, "top_p": config.top_p, "max_tokens": config.max_tokens}
    return {"benchmark": benchmark.name, "protocol": asked}


def note_evaluated(run: Run[Any], prompts: Sequence[Prompt], general_prompts: Sequence[Prompt]) -> None:
    """Write down which prompts are evaluated on, to hold training data against them, and who scores general
    answers."""
    if run.rank == 0:
        named = {"reasoning": prompts, "general": general_prompts}
        scored_by = f"the hidden truth of data={run.config.data.name}" if run.data.truth else None
        found = {kind: [prompt.id for prompt in found] for kind, found in named.items()}
        write_json(run.folder.evaluated, {"general_scored_by": scored_by, **found})


def quick_evaluation(run: Run[Any], ranks: Ranks, weights: Weights, step: int) -> dict[str, float]:
    """A few development prompts after a step, as metrics under eval/; with some of the completions they are
    kept in dev_evaluations.jsonl. A request to stop does not interrupt it: the weights have already moved,
    and the step is finished first."""
    began, config = time.monotonic(), evaluate.short(run.stage.eval)
    with run.phase("evaluating"):
        evaluation = measure(run, ranks, weights, step, config, quick=True)
    metrics = evaluate.logged(evaluation.metrics)
    run.note_dev(step, metrics, evaluation.samples)
    return metrics | {"time/eval_s": time.monotonic() - began}


def answer_dev_prompts(run: Run[Any], ranks: Ranks, weights: Weights, step: int) -> None:
    """The short evaluation of a stage's result: the same problems after every stage, base included, and after
    a stage's last step."""
    if run.config.benchmark is None and run.stage.eval.shown and run.stage.eval.every_problems:
        quick_evaluation(run, ranks, weights, step)


def finish_stage(
    run: Run[Any],
    engine: Engine,
    checkpoint: Path,
    data_hash: str | None = None,
    extra: Metrics | None = None,
) -> None:
    """The full evaluation, then the record. `data_hash`: of the training data, if not the source's; `extra`:
    more metrics for the record."""
    run.note_memory("training")
    step = checkpoints.step_of(checkpoint)
    answer_dev_prompts(run, engine, engine, step)
    with run.phase("evaluating"):
        evaluation = measure(run, engine, engine, step, run.stage.eval)
    metrics: Metrics = {**evaluation.metrics, **(extra or {})}
    run.finish(checkpoint, metrics, evaluation.samples, data_hash)
