"""Training on pairs of answers, of which one is preferred: the teacher's to the student's own, or by scores.

DPO (arXiv 2305.18290) compares with the student as it came; SimPO (arXiv 2405.14734) with nothing.

Axes: P pairs, B = 2P answers of a micro-batch, the preferred one of each pair first; N tokens of all of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from r1pipe.chat.template import Chat
from r1pipe.config import DistillConfig, RankingConfig
from r1pipe.core.errors import DataError
from r1pipe.core.types import Completion, Demonstration, PreferencePair
from r1pipe.model import Policy
from r1pipe.model.hf import HFModel
from r1pipe.runs import stopping
from r1pipe.train.distill.losses import dpo_margins, ranking_loss, simpo_margins
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.passes import Pass
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.finish import finish_stage
from r1pipe.train.loading import load_frozen, load_policy, load_weights
from r1pipe.train.rl.base_reference import BaseReference
from r1pipe.train.rl.batch import MicroBatch, Rollout, collate, padded_tokens
from r1pipe.train.rl.update import Balances, Reference, read
from r1pipe.train.rollout import SamplingParams
from r1pipe.train.run import Run, log
from r1pipe.train.sft.loop import BALANCE_LOSS, Batches, mean_terms, steps_in, train
from r1pipe.train.shards import SHARD_ROUNDS, in_order, in_shards

MARGIN, ACCURACY = "ranking/margin", "ranking/accuracy"
CHOSEN, REJECTED = "ranking/chosen_logp", "ranking/rejected_logp"
TEACHER_TOKENS = "distill/teacher_tokens"


@dataclass
class TokenizedPair:
    """Two answers to one prompt as token ids, the end-of-sequence token included where they have one."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    def rollouts(self) -> list[Rollout]:
        return [
            Rollout(self.prompt, Completion(answer, [0.0] * len(answer), "stop"), 0.0, True)
            for answer in (self.chosen, self.rejected)
        ]

    @property
    def longest(self) -> int:
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def learn_ranking(
    run: Run[DistillConfig], pairs: Sequence[TokenizedPair], data_hash: str, by_teacher: bool
) -> None:
    """Train on pairs, from those that fit to the record; `by_teacher`: it wrote the preferred ones. Raises
    DataError if there are none."""
    stage = run.stage
    assert stage.ranking is not None
    differing = [pair for pair in pairs if pair.chosen != pair.rejected]
    fitting = [pair for pair in differing if pair.longest <= stage.sequence_length]
    log.info(
        f"{len(fitting)} of {len(pairs)} pairs; the others are equal, or longer than stage.sequence_length="
        f"{stage.sequence_length}"
    )
    if not fitting:
        raise DataError(
            f"none of {len(pairs)} pairs has two different answers of at most stage.sequence_length="
            f"{stage.sequence_length} tokens; raise it, or get more answers from the teacher"
        )
    steps = steps_in(len(fitting), stage.batch_size, stage.epochs, stage.max_steps)
    policy = load_policy(run, freeze_mtp=True)  # no gradient reaches MTP layers
    adapted = isinstance(policy, HFModel) and policy.adapter is not None
    reference: Reference | None = None
    if stage.ranking.loss == "dpo" and not adapted:
        reference = Reference(load_frozen(run, run.config.weights_from, again=True), run.config.engine)
    engine = Engine(policy, stage.optim, stage.router, run.config.engine, steps)
    if stage.ranking.loss == "dpo" and adapted:
        reference = BaseReference(engine)
    loss_of = partial(
        PairLoss,
        engine,
        config=stage.ranking,
        reference=reference,
        balance_weight=stage.router.balance_alpha,
        by_teacher=by_teacher,
    )
    checkpoint = train(run, engine, epochs_of_pairs(run, fitting, stage.batch_size), steps, loss_of)
    finish_stage(run, engine, checkpoint, data_hash)


# --- pairs


def pairs_of_texts(chat: Chat, pairs: Sequence[PreferencePair]) -> list[TokenizedPair]:
    """Pairs whose answers are both written."""
    return [
        TokenizedPair(
            chat.prompt_tokens(pair.prompt),
            chat.example(pair.prompt, pair.chosen).targets,
            chat.example(pair.prompt, pair.rejected).targets,
        )
        for pair in pairs
    ]


def pairs_with_own(run: Run[DistillConfig], demonstrations: Sequence[Demonstration]) -> list[TokenizedPair]:
    """Each response beside one that the student draws before it learns, which is the rejected one; drawn
    answers are kept, so that a resumed run does not draw them again. All ranks call."""
    chat = run.chat
    prompts = [chat.prompt_tokens(demonstration.prompt) for demonstration in demonstrations]
    chosen = [chat.example(one.prompt, one.response).targets for one in demonstrations]
    longest = run.stage.sequence_length
    fitting = [i for i, prompt in enumerate(prompts) if len(prompt) + len(chosen[i]) <= longest]
    own = own_answers(run, [prompts[i] for i in fitting])
    return [TokenizedPair(prompts[i], chosen[i], answer) for i, answer in zip(fitting, own, strict=True)]


def own_answers(run: Run[DistillConfig], prompts: Sequence[list[int]]) -> list[list[int]]:
    """One answer of the student, as it came, to each prompt."""
    ranking, weights_from = run.stage.ranking, run.config.weights_from
    assert ranking is not None and weights_from is not None, "a student without weights has no answers"
    sampling, longest, ranks = ranking.sampling, run.stage.sequence_length, Ranks(run.config.engine)

    def params(number: int, count: int) -> SamplingParams:
        return SamplingParams(
            min(sampling.max_tokens, longest - 1),
            sampling.temperature,
            sampling.top_p,
            seed=run.seed("own answers"),
            first=number,
            stride=count,
            max_num_seqs=sampling.max_num_seqs,
        )

    def draw(items: Sequence[list[int]], number: int, count: int, progress: Any) -> pa.Table:
        most = params(number, count).max_tokens
        limits = [min(most, longest - len(prompt)) for prompt in items]
        drawn = run.sampler.generate(
            items, params(number, count), progress, limits=limits, stop=stopping.requested
        )
        return pa.table({"tokens": [completion.tokens for completion in drawn]})

    with run.phase("sampling"):
        run.sampler.update(load_weights(run, weights_from, ranks), 0)
        per_shard = SHARD_ROUNDS * sampling.max_num_seqs
        idle = partial(run.sampler.generate, [], params(0, 1), stop=stopping.requested)
        shards = in_shards(run, ranks, "own answers", prompts, per_shard, draw, idle)
        run.sampler.forget()
    return [row["tokens"] for [row] in in_order(shards)]


def epochs_of_pairs(run: Run[Any], pairs: Sequence[TokenizedPair], batch_size: int) -> Batches:
    """Endless passes over the pairs, each in an order of its own."""
    per_epoch = -(-len(pairs) // batch_size)

    def batches(step: int, position: None) -> Iterator[tuple[list[TokenizedPair], None]]:
        for epoch in count(step // per_epoch):
            order = run.rng("order", epoch).permutation(len(pairs))
            for number in range(per_epoch):
                if epoch * per_epoch + number >= step:
                    yield [pairs[i] for i in order[number * batch_size :][:batch_size]], None

    return batches


# --- the loss


class PairLoss:
    """One optimizer step's mean loss over pairs, split into this rank's micro-batches (see StepLoss)."""

    def __init__(
        self,
        engine: Engine,
        batch: Sequence[TokenizedPair],
        config: RankingConfig,
        reference: Reference | None,
        balance_weight: float,
        by_teacher: bool,
    ):
        self.engine, self.config, self.reference = engine, config, reference
        self.balance_weight, self.by_teacher = balance_weight, by_teacher
        self.chosen = sum(len(pair.chosen) for pair in batch)
        # a prompt is read once for both, without its last token, which begins each answer
        self.tokens = sum(len(pair.prompt) - 1 + len(pair.rejected) for pair in batch) + self.chosen
        self.per_pair = engine.world_size / len(batch)  # the engine averages over ranks
        self.mine = [(pair, self.per_pair) for pair in batch[engine.rank :: engine.world_size]]
        self.mine = self.mine or [(batch[0], 0.0)]  # every rank takes part

    def micro_losses(self, accumulation: int) -> list[Pass[MicroBatch]]:
        micros = [
            collate(
                [rollout for pair, _ in part for rollout in pair.rollouts()],
                [weight for _, weight in part for _ in range(2)],
                self.engine.world_size / self.tokens,
                self.engine.device,
            )
            for part in in_parts(self.mine, accumulation, self.config.max_tokens_per_micro_batch)
        ]
        if self.reference is not None:
            found = self.reference.logprobs(micros, temperature=1.0)
            for micro, reference_N in zip(micros, found, strict=True):
                micro.reference_N = reference_N
        reading = partial(read, with_loss=self.balance_weight > 0, replay=False)
        model, alpha = self.engine.module, self.balance_weight
        return [Pass(model, m, reading, self._learn, alpha, m.balance_weight) for m in micros]

    def _learn(
        self, model: Policy, micro: MicroBatch, hidden_ND: Tensor, balances: Balances
    ) -> tuple[Tensor, dict[str, float]]:
        """The share of the loss, and of the metrics, of a micro-batch."""
        logprobs_N, lengths_B = model.lm_head(hidden_ND, micro.targets_N), micro.lengths_B
        sums_B = torch.segment_reduce(logprobs_N, "sum", lengths=lengths_B)
        weights_P = micro.weights_N[lengths_B.cumsum(0) - 1][0::2]
        chosen_P, rejected_P = sums_B[0::2], sums_B[1::2]
        beta = self.config.beta
        if micro.reference_N is not None:
            before_B = torch.segment_reduce(micro.reference_N, "sum", lengths=lengths_B)
            margins_P = dpo_margins(chosen_P, rejected_P, before_B[0::2], before_B[1::2], beta)
        else:
            margins_P = simpo_margins(chosen_P, rejected_P, lengths_B[0::2], lengths_B[1::2], beta)
        loss_P = ranking_loss(margins_P, self.config)
        if self.config.sft_weight:
            loss_P = loss_P - self.config.sft_weight * chosen_P / lengths_B[0::2]
        measured = {
            MARGIN: margins_P,
            ACCURACY: (margins_P > 0).float(),
            CHOSEN: chosen_P / lengths_B[0::2],
            REJECTED: rejected_P / lengths_B[1::2],
        }
        found = {name: (weights_P * of_P.detach()).sum().item() for name, of_P in measured.items()}
        return (weights_P * loss_P).sum(), found

    def terms(self, loss: float, passes: Sequence[Pass[MicroBatch]]) -> dict[str, float]:
        means = mean_terms(self.engine, passes)
        own = loss - self.balance_weight * means.get(BALANCE_LOSS, 0.0)
        more = {TEACHER_TOKENS: float(self.chosen)} if self.by_teacher else {}
        return {"train/loss": own, **means, **more}


def in_parts(
    pairs: Sequence[tuple[TokenizedPair, float]], accumulation: int, max_tokens: int
) -> list[list[tuple[TokenizedPair, float]]]:
    """Pairs, longest first, in at least `accumulation` micro-batches where there are so many, of at most
    `max_tokens` with padding; a pair that is longer has one of its own."""
    size = -(-len(pairs) // accumulation)
    parts: list[list[tuple[TokenizedPair, float]]] = []
    for one in sorted(pairs, key=lambda pair: -pair[0].longest):
        if parts and len(parts[-1]) < size:
            rows = [rollout for pair, _ in [*parts[-1], one] for rollout in pair.rollouts()]
            if padded_tokens(rows) <= max_tokens:
                parts[-1].append(one)
                continue
        parts.append([one])
    return parts
