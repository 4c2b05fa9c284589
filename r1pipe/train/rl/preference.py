"""Training of a reward model: pairs or labels into token rows, optimizer steps, a held-out judgement.

A checkpoint holds a folder for each model; one that is finished has quality.json in it.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import copytree
from typing import Any

import torch
from torch import Tensor

from r1pipe.chat.template import Chat
from r1pipe.config import RewardModelConfig
from r1pipe.core.errors import DataError
from r1pipe.data.fitting import draw_prompts_that_fit
from r1pipe.data.source import Source
from r1pipe.model import Balance
from r1pipe.rewards import models
from r1pipe.rewards.models import RewardModel
from r1pipe.rewards.quality import auc, length_correlation, pair_accuracy
from r1pipe.runs import checkpoints, heartbeat, stopping
from r1pipe.runs.files import write_json
from r1pipe.runs.reward_model_quality import HARMLESS, HELPFUL, KINDS, QUALITY, describe
from r1pipe.runs.stopping import Interrupted
from r1pipe.train.engine.engine import Engine
from r1pipe.train.run import Run
from r1pipe.train.sft.loop import shown, step_metrics

HELD_OUT = 0  # the stream that held-out examples are drawn from: the same ones in every run
NAMES = {HELPFUL: "preference pairs", HARMLESS: "safety labels"}

log = logging.getLogger("r1pipe")


@dataclass
class Item:
    """One term of a loss: the rows of a pair as token ids (preferred one first), or one labelled row."""

    rows: list[list[int]]
    prompt: int = 0  # tokens of the prompt, which every row begins with
    safe: bool = True  # of a labelled row

    def __len__(self) -> int:
        return max(map(len, self.rows))


@dataclass
class Examples:
    """What one reward model learns from and is judged on."""

    kind: str
    learned: list[Item]
    held_out: list[Item]
    pad_id: int


def read_examples(run: Run[RewardModelConfig], kind: str, data: Source, chat: Chat) -> Examples:
    """The data's examples of a kind, maybe none: then no model of this kind is trained.

    What is longer than the context is passed over, and as much drawn in its place as the data has. Raises
    DataError where too few are left.
    """
    stage, name = run.stage, NAMES[kind]
    wanted = stage.pairs if kind == HELPFUL else stage.labels
    learned, too_long = _draw(run, kind, data, chat, ("train", wanted, run.seed(name)))
    if not learned and not too_long:
        log.info("data=%s has no %s: no %s model is trained", run.config.data.name, name, kind)
        return Examples(kind, [], [], chat.pad_id)
    if len(learned) < stage.batch_size:
        raise DataError(
            f"data={run.config.data.name} gives {len(learned)} {name} to train on{_beside(run, too_long)}, "
            f"fewer than stage.batch_size={stage.batch_size}; lower it or choose other data"
        )
    held_out, too_long = _draw(run, kind, data, chat, (stage.eval.split, stage.held_out, HELD_OUT))
    if not held_out:
        raise DataError(
            f"data={run.config.data.name} gives no {name} of split {stage.eval.split} to judge the model on"
            f"{_beside(run, too_long)}; choose other data"
        )
    return Examples(kind, learned, held_out, chat.pad_id)


def _beside(run: Run[RewardModelConfig], too_long: int) -> str:
    longest = run.config.model.max_position_embeddings
    return f" beside {too_long} longer than model.max_position_embeddings={longest}" if too_long else ""


def _draw(
    run: Run[RewardModelConfig], kind: str, data: Source, chat: Chat, drawn: tuple[str, int, int]
) -> tuple[list[Item], int]:
    """Up to so many items of a split that fit into the context, and how many were passed over for them."""
    split, n, seed = drawn
    longest = run.config.model.max_position_embeddings
    fitting, too_long = draw_prompts_that_fit(
        lambda m: items(kind, data, chat, (split, m, seed)), n, lambda item: len(item) <= longest
    )
    if fitting or too_long:
        log.info("%d %s (%s), %d more are too long", len(fitting), NAMES[kind], split, too_long)
    return fitting, too_long


def items(kind: str, data: Source, chat: Chat, drawn: tuple[str, int, int]) -> list[Item]:
    """The data's pairs or labels as a model of this kind reads them; `drawn`: split, how many, seed."""
    if kind == HELPFUL:
        judged = [(p.prompt, [p.chosen, p.rejected], True) for p in data.preference_pairs(*drawn)]
    else:
        judged = [(label.prompt, [label.response], label.safe) for label in data.safety_labels(*drawn)]
    return [
        Item(
            [models.judged_tokens(kind, chat, prompt, response) for response in responses],
            len(chat.prompt_tokens(prompt)),
            safe,
        )
        for prompt, responses, safe in judged
    ]


def steps_of(stage: RewardModelConfig, examples: Examples) -> int:
    """Optimizer steps of one model; only whole batches are learned from."""
    steps = stage.epochs * (len(examples.learned) // stage.batch_size)
    return min(steps, stage.max_steps) if stage.max_steps else steps


def newest_checkpoint(run: Run[RewardModelConfig]) -> Path | None:
    steps = checkpoints.steps(run.folder.checkpoints)
    return run.folder.checkpoint(steps[-1]) if steps else None


def train_reward_model(
    run: Run[RewardModelConfig], examples: Examples, first: int, steps: int, resumes: bool
) -> None:
    """One model's optimizer steps, logged as steps `first` + 1 to `first` + `steps` of the run.

    With `resumes` it goes on from the newest checkpoint, if there is one.
    """
    stage, accumulation = run.stage, run.config.engine.gradient_accumulation
    alpha = stage.router.balance_alpha
    model = RewardModel(run.load_model(run.config.weights_from))
    engine = Engine(model, stage.optim, stage.router, run.config.engine, steps)
    begun = run.resume(engine)[0] - first if resumes else 0
    for step in range(begun, steps):
        began = time.monotonic()
        batch = batch_of(run, examples, step)
        heartbeat.at_step(first + step + 1)
        with run.phase("update"):
            [tokens] = engine.sum_over_ranks([sum(len(row) for item in batch for row in item.rows)])
            weight = alpha * engine.world_size / tokens  # the engine averages over the ranks
            micros = micro_losses(engine, examples, batch, accumulation, weight)
            metrics = step_metrics(engine.train_step(micros))
        metrics["train/tokens_per_s"] = tokens / (time.monotonic() - began)
        done = step + 1
        run.log(first + done, metrics)
        run.progress(f"train {examples.kind}", done, steps, "steps", **shown(metrics))
        leaving = stopping.agreed(engine)
        if leaving or done == steps or (stage.save_every and done % stage.save_every == 0):
            export = partial(_export, run, examples, done == steps)
            run.save_checkpoint(engine, first + done, {}, export)
        if leaving:
            raise Interrupted(leaving)


def batch_of(run: Run[RewardModelConfig], examples: Examples, step: int) -> list[Item]:
    """This rank's items of a step (counted from 0): a function of the step alone, so that resume is exact."""
    size = run.stage.batch_size
    epoch, number = divmod(step, len(examples.learned) // size)
    order = run.rng(f"{examples.kind} order", epoch).permutation(len(examples.learned))
    return [examples.learned[i] for i in order[number * size :][:size][run.rank :: run.world_size]]


def micro_losses(
    engine: Engine, examples: Examples, batch: Sequence[Item], accumulation: int, balance_weight: float
) -> list[Callable[[], Tensor]]:
    """This rank's micro-batches, longest first, each giving its share of the rank's mean loss, and
    `balance_weight` for each token's balance loss (0: none)."""
    ordered = sorted(batch, key=len, reverse=True)
    size = -(-len(ordered) // accumulation)
    micros = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    return [
        partial(_share_of_loss, engine, examples, micro, len(micro) / len(batch), balance_weight)
        for micro in micros
    ]


def _share_of_loss(
    engine: Engine, examples: Examples, micro: Sequence[Item], share: float, balance_weight: float
) -> Tensor:
    """`share` of the preference loss, and `balance_weight` for each token's balance loss (0: none)."""
    rows = [row for item in micro for row in item.rows]
    tokens_BT, last_B = models.padded(rows, examples.pad_id, engine.device)
    balance = Balance.of_lengths(last_B + 1, tokens_BT.shape[1], with_loss=balance_weight > 0)
    loss = share * _preference_loss(examples.kind, engine.module(tokens_BT, last_B, balance), micro)
    return loss + balance_weight * balance.total()


def _preference_loss(kind: str, scores: Tensor, micro: Sequence[Item]) -> Tensor:
    if kind == HELPFUL:
        return models.bradley_terry_loss(scores[0::2], scores[1::2])
    safe = torch.tensor([float(item.safe) for item in micro], device=scores.device)
    return models.point_wise_loss(scores, safe)


def standing(
    model: RewardModel, kind: str, held_out: Sequence[Item], pad_id: int
) -> tuple[dict[str, Any], list[float]]:
    """How a model does on held-out examples and the score of each of their rows."""
    rows = [row for item in held_out for row in item.rows]
    scores = models.score_rows(model, rows, pad_id)
    lengths = [len(row) - item.prompt for item in held_out for row in item.rows]
    found: dict[str, Any] = {"length_correlation": length_correlation(scores, lengths)}
    if kind == HELPFUL:
        return found | {"pairs": len(held_out), "accuracy": pair_accuracy(scores[0::2], scores[1::2])}, scores
    safe = [item.safe for item in held_out]
    right = [(score > 0) == label for score, label in zip(scores, safe, strict=True)]
    found |= {"labels": len(held_out), "accuracy": sum(right) / len(right), "auc": auc(scores, safe)}
    return found, scores


def _export(
    run: Run[RewardModelConfig], examples: Examples, finished: bool, model: RewardModel, folder: Path
) -> None:
    """Write this model beside those that are finished; rank 0 alone judges it, on the whole weights."""
    before = newest_checkpoint(run)
    for kind in KINDS[: KINDS.index(examples.kind)]:
        if before and (before / kind).is_dir():
            copytree(before / kind, folder / kind)
    quality = None
    if finished:
        quality, scores = standing(model, examples.kind, examples.held_out, examples.pad_id)
        log.info("%s", describe(examples.kind, quality))
        if examples.kind == HELPFUL:
            models.standardise(model, scores)
    models.save_reward_model(model, folder / examples.kind)
    if quality:
        write_json(folder / examples.kind / QUALITY, quality)
