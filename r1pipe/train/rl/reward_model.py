"""Training of a reward model: pairs or labels into token rows, optimizer steps, quality on held-out examples.

A checkpoint holds a folder for each model; a finished one has quality.json in it.
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
from r1pipe.core.types import Demonstration, PreferencePair, Prompt
from r1pipe.data.screening import Screening
from r1pipe.data.source import Source, draw_prompts_that_fit
from r1pipe.model import Balance
from r1pipe.rewards import models
from r1pipe.rewards.judge.judging import Judge
from r1pipe.rewards.judge.labels import rank_pairs
from r1pipe.rewards.models import RewardModel, auc, length_correlation, pair_accuracy
from r1pipe.runs import checkpoints, heartbeat, samples, stopping
from r1pipe.runs.files import write_json
from r1pipe.runs.reward_model_quality import HARMLESS, HELPFUL, KINDS, QUALITY, describe
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.metrics import shown, step_metrics
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.loading import load_policy
from r1pipe.train.run import Run

HELD_OUT_SEED = 0  # of the held-out examples: the same in every run
NAMES = {HELPFUL: "preference pairs", HARMLESS: "safety labels"}
LEARNED = {HELPFUL: "preferences", HARMLESS: "labels"}  # kinds of data

log = logging.getLogger("r1pipe")


@dataclass
class Item:
    """One term of a loss: the rows of a pair as token ids (preferred one first), or one labelled row."""

    rows: list[list[int]]
    prompt: int = 0  # tokens of the prompt, which every row starts with
    safe: bool = True  # of a labelled row
    example: Demonstration | None = None  # the prompt and the better or the labelled answer, for the record

    def __len__(self) -> int:
        return max(map(len, self.rows))


@dataclass
class Examples:
    """The training and held-out examples of one reward model."""

    kind: str
    learned: list[Item]
    held_out: list[Item]
    pad_id: int


def read_examples(
    run: Run[RewardModelConfig], kind: str, ranked: Sequence[PreferencePair] = (), judge: str | None = None
) -> Examples:
    """The data's examples that fit the context; without any, no model of this kind is trained. Where `judge`
    has `ranked` pairs, those are learned from. Raises DataError where some exist but too few."""
    stage, name, chat = run.stage, NAMES[kind], run.chat
    longest, source = run.config.model.max_position_embeddings, f"data={run.config.data.name}"

    def draw(split: str, n: int, seed: int) -> tuple[list[Item], str]:
        """Items that fit, and for messages how many did not."""
        fitting, too_long = draw_prompts_that_fit(
            lambda m: items(kind, run.data, chat, (split, m, seed)), n, lambda item: len(item) <= longest
        )
        if fitting or too_long:
            log.info("%d %s (%s), %d more are too long", len(fitting), name, split, too_long)
        limit = f"model.max_position_embeddings={longest}"
        return fitting, f" besides {too_long} longer than {limit}" if too_long else ""

    if ranked and kind == HELPFUL:
        found, too_long = pair_items(chat, ranked, judge), ""
        learned = [item for item in found if len(item) <= longest]
    else:
        learned, too_long = draw("train", stage.pairs if kind == HELPFUL else stage.labels, run.seed(name))
    if not learned and not too_long:
        log.info("%s has no %s: no %s model is trained", source, name, kind)
        return Examples(kind, [], [], chat.pad_id)
    if len(learned) < stage.batch_size:
        raise DataError(
            f"{source} gives {len(learned)} {name} to train on{too_long}, "
            f"fewer than stage.batch_size={stage.batch_size}; lower it or choose other data"
        )
    held_out, too_long = draw(stage.eval.split, stage.held_out, HELD_OUT_SEED)
    if not held_out:
        raise DataError(
            f"{source} gives no {name} of split {stage.eval.split} to evaluate the model on{too_long}; "
            "choose other data"
        )
    return Examples(kind, learned, held_out, chat.pad_id)


def rank_by_judge(run: Run[RewardModelConfig], ranks: Ranks, judge: Judge) -> list[PreferencePair]:
    """The stage.pairs pairs of the data as the judge ranks them. Rank 0 asks; all ranks call, all get them.
    Raises DataError where it leaves none."""
    stage = run.stage
    kept: list[PreferencePair] = []
    assert stage.judge is not None
    if ranks.rank == 0:
        pairs = run.data.preference_pairs("train", stage.pairs, run.seed(NAMES[HELPFUL]))

        def progress(done: int, total: int) -> None:
            run.progress("judging", done, total, "pairs")

        kept, left = rank_pairs(judge, pairs, stage.judge.min_margin, stage.judge.balance_lengths, progress)
        left_out = ", ".join(f"{count} {why}" for why, count in left.items())
        log.info("the judge ranked %d of %d pairs; left out: %s", len(kept), len(pairs), left_out)
        if pairs and not kept:
            run.warn(f"the judge ranked none of {len(pairs)} pairs; left out: {left_out}")
    kept = ranks.all_gather_objects(kept)[0]
    if not kept:
        raise DataError(
            f"judge={run.config.judge} ranked no pair of data={run.config.data.name} that can be learned "
            f"from; lower stage.judge.min_margin={stage.judge.min_margin:g}, say "
            "stage.judge.balance_lengths=false, or choose other data"
        )
    return kept


def items(kind: str, data: Source, chat: Chat, drawn: tuple[str, int, int]) -> list[Item]:
    """The data's pairs or labels as a model of this kind reads them; `drawn`: split, how many, seed."""
    if kind == HELPFUL:
        return pair_items(chat, data.preference_pairs(*drawn))
    return [
        Item(
            [models.scored_tokens(kind, chat, label.prompt, label.response)],
            len(chat.prompt_tokens(label.prompt)),
            label.safe,
            shown_as(label.prompt, label.response),
        )
        for label in data.safety_labels(*drawn)
    ]


def pair_items(chat: Chat, pairs: Sequence[PreferencePair], judge: str | None = None) -> list[Item]:
    """`judge`: who ranked them, if not the data."""
    return [
        Item(
            [models.scored_tokens(HELPFUL, chat, pair.prompt, text) for text in (pair.chosen, pair.rejected)],
            len(chat.prompt_tokens(pair.prompt)),
            example=shown_as(pair.prompt, pair.chosen, judge),
        )
        for pair in pairs
    ]


def shown_as(prompt: Prompt, response: str, judge: str | None = None) -> Demonstration:
    """The better answer of a pair, or the labelled one, for the record of what was trained on."""
    return Demonstration(prompt, response, source=prompt.source, licence=prompt.licence, judge=judge)


def note_trained_on(run: Run[RewardModelConfig], trained: Sequence[Examples]) -> None:
    """Write down where each pair and label that is learned came from, and what screening finds in them."""
    if run.rank == 0:
        learned = [
            (item.example, LEARNED[examples.kind], sum(map(len, item.rows)))
            for examples in trained
            for item in examples.learned
            if item.example is not None
        ]
        samples.write_trained_on(run.folder.trained_on, learned)
        screening = Screening(run.config.screening)
        for example, _, _ in learned:
            screening.count(example)
        write_json(run.folder.screening, screening.report())


def steps_of(stage: RewardModelConfig, examples: Examples) -> int:
    """Optimizer steps of one model; an incomplete last batch is dropped."""
    steps = stage.epochs * (len(examples.learned) // stage.batch_size)
    return min(steps, stage.max_steps) if stage.max_steps else steps


def train_reward_model(
    run: Run[RewardModelConfig], examples: Examples, first: int, steps: int, resumes: bool
) -> None:
    """One model's optimizer steps, logged as steps `first` + 1 to `first` + `steps` of the run."""
    stage, accumulation = run.stage, run.config.engine.gradient_accumulation
    alpha = stage.router.balance_alpha
    model = RewardModel(load_policy(run))
    engine = Engine(model, stage.optim, stage.router, run.config.engine, steps)
    begun = run.resume(engine)[0] - first if resumes else 0
    for step in range(begun, steps):
        began = time.monotonic()
        # a function of the step alone, so that resume is exact
        epoch, number = divmod(step, len(examples.learned) // stage.batch_size)
        order = run.rng(f"{examples.kind} order", epoch).permutation(len(examples.learned))
        of_all_ranks = order[number * stage.batch_size :][: stage.batch_size]
        batch = [examples.learned[i] for i in of_all_ranks[run.rank :: run.world_size]]
        heartbeat.at_step(first + step + 1)
        with run.phase("update"):
            [tokens] = engine.sum_over_ranks([sum(len(row) for item in batch for row in item.rows)])
            weight = alpha * engine.world_size / tokens  # the engine averages over the ranks
            micros = in_micro_batches(batch, accumulation, stage.max_tokens_per_micro_batch)
            metrics = step_metrics(engine.train_step(micro_losses(engine, examples, micros, weight)))
        metrics["train/tokens_per_s"] = tokens / (time.monotonic() - began)
        done = step + 1
        run.log(first + done, metrics)
        run.progress(f"train {examples.kind}", done, steps, "steps", **shown(metrics))
        run.check_saved(engine)
        leaving = stopping.agreed(engine)
        if leaving or done == steps or (stage.save_every and done % stage.save_every == 0):
            export = partial(_export, run, examples, done == steps)
            run.save_checkpoint(engine, first + done, {}, export)
        if leaving:
            raise stopping.Interrupted(leaving)


def in_micro_batches(batch: Sequence[Item], accumulation: int, max_tokens: int) -> list[list[Item]]:
    """Items, longest first, in at least `accumulation` parts of at most `max_tokens` with padding; an item
    that is larger is a part of its own."""
    size = -(-len(batch) // accumulation)
    micros: list[list[Item]] = []
    for item in sorted(batch, key=len, reverse=True):
        if micros and len(micros[-1]) < size:
            rows = sum(len(one.rows) for one in [*micros[-1], item])
            if rows * len(micros[-1][0]) <= max_tokens:
                micros[-1].append(item)
                continue
        micros.append([item])
    return micros


def micro_losses(
    engine: Engine, examples: Examples, micros: Sequence[Sequence[Item]], balance_weight: float
) -> list[Callable[[], Tensor]]:
    """Of each of this rank's micro-batches its share of the mean preference loss, plus `balance_weight` times
    each token's balance loss (0: none)."""
    whole = sum(map(len, micros))

    def share_of_loss(micro: Sequence[Item]) -> Tensor:
        rows = [row for item in micro for row in item.rows]
        tokens_BT, last_B = models.padded(rows, examples.pad_id, engine.device)
        balance = Balance.of_lengths(last_B + 1, tokens_BT.shape[1], with_loss=balance_weight > 0)
        scores_B = engine.module(tokens_BT, last_B, balance)
        if examples.kind == HELPFUL:
            loss = models.bradley_terry_loss(scores_B[0::2], scores_B[1::2])
        else:
            safe_B = torch.tensor([float(item.safe) for item in micro], device=scores_B.device)
            loss = models.point_wise_loss(scores_B, safe_B)
        return len(micro) / whole * loss + balance_weight * balance.total()

    return [partial(share_of_loss, micro) for micro in micros]


def measure_quality(
    model: RewardModel, kind: str, held_out: Sequence[Item], pad_id: int
) -> tuple[dict[str, Any], list[float]]:
    """A model's quality on held-out examples, and the score of each of their rows."""
    rows = [row for item in held_out for row in item.rows]
    scores = models.score_rows(model, rows, pad_id)
    lengths = [len(row) - item.prompt for item in held_out for row in item.rows]
    quality: dict[str, Any] = {"length_correlation": length_correlation(scores, lengths)}
    if kind == HELPFUL:
        return quality | {
            "pairs": len(held_out),
            "accuracy": pair_accuracy(scores[0::2], scores[1::2]),
        }, scores
    safe = [item.safe for item in held_out]
    right = [(score > 0) == label for score, label in zip(scores, safe, strict=True)]
    quality |= {"labels": len(held_out), "accuracy": sum(right) / len(right), "auc": auc(scores, safe)}
    return quality, scores


def _export(
    run: Run[RewardModelConfig], examples: Examples, finished: bool, model: RewardModel, folder: Path
) -> None:
    """Write this model, measured if it is finished, beside copies of those finished before."""
    saved_steps = checkpoints.steps(run.folder.checkpoints)
    for kind in KINDS[: KINDS.index(examples.kind)] if saved_steps else ():
        earlier = run.folder.checkpoint(saved_steps[-1]) / kind
        if earlier.is_dir():
            copytree(earlier, folder / kind)
    target = folder / examples.kind
    if not finished:
        models.save_reward_model(model, target)
        return
    quality, scores = measure_quality(model, examples.kind, examples.held_out, examples.pad_id)
    log.info("%s", describe(examples.kind, quality))
    if examples.kind == HELPFUL:
        models.standardise(model, scores)
    models.save_reward_model(model, target)
    write_json(target / QUALITY, quality)
