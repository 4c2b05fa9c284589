"""Training towards the teacher's distribution of each next token, along its answers and the student's own.

The teacher's probabilities are read as the student trains, or were stored with its answers. A share of each
batch's rows is on-policy: the student answers their prompts itself (GKD, arXiv 2306.13649, alg. 1, by rows
and not by batches). What is drawn is a function of the seed, the step and the weights: resume is exact.

Axes: B rows, T tokens, N learned tokens, D hidden width, V vocabulary, K stored tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from r1pipe.chat.template import Chat
from r1pipe.config import DistillConfig, DivergenceConfig
from r1pipe.core.errors import CheckpointError, DataError
from r1pipe.core.paths import RunFolder
from r1pipe.core.types import Demonstration, Example
from r1pipe.data.packing import Batch, Packed, collate, pack
from r1pipe.model import Balance, Policy
from r1pipe.runs import samples
from r1pipe.train.distill.losses import of_stored, of_vocabulary
from r1pipe.train.distill.teacher import FrozenTeacher, load_teacher
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.passes import Pass
from r1pipe.train.extract.alignment import TopK
from r1pipe.train.extract.dataset import read_rows
from r1pipe.train.extract.stored import Stored
from r1pipe.train.finish import finish_stage
from r1pipe.train.loading import load_policy
from r1pipe.train.rollout import SamplingParams
from r1pipe.train.run import Run, log
from r1pipe.train.sft.loop import (
    Batches,
    LMLoss,
    epochs_of,
    learned,
    mtp_sum,
    pack_demonstrations,
    steps_in,
    train,
)

KL = "distill/kl"  # KL(teacher || student) per learned token, in nats, whatever the loss is
TEACHER_TOKENS = "distill/teacher_tokens"  # learned tokens whose distribution the teacher gave
ON_POLICY = "distill/on_policy_tokens"  # those among them that the student had drawn


def learn_live(run: Run[DistillConfig], demonstrations: Sequence[Demonstration], data_hash: str) -> None:
    """Train towards a teacher that is read along the way, from packing to record. Raises DataError if no
    demonstration fits a row, and CheckpointError where the teacher reads other tokens."""
    stage, teacher_from = run.stage, run.config.teacher_from
    assert stage.divergence is not None and teacher_from is not None
    rows = pack_demonstrations(run.chat, demonstrations, stage.sequence_length)
    steps = steps_in(len(rows), stage.batch_size, stage.epochs, stage.max_steps)
    model, teacher_model = load_policy(run), load_teacher(run, teacher_from)
    engine = Engine(model, stage.optim, stage.router, run.config.engine, steps)
    teacher = FrozenTeacher(teacher_model, run.config.engine)
    batches = epochs_of(run, rows, stage.batch_size)
    if stage.divergence.on_policy:
        batches = partial(with_own_answers, run, engine, batches)
    loss_of = divergence_loss(run, engine, stage.divergence, teacher)
    finish_stage(run, engine, train(run, engine, batches, steps, loss_of), data_hash)


def learn_stored(run: Run[DistillConfig], examples: Sequence["StoredExample"], data_hash: str) -> None:
    """Train towards probabilities that were stored with the responses, from packing to record. Raises
    DataError if none fits a row."""
    stage = run.stage
    assert stage.divergence is not None
    rows, dropped = pack(examples, stage.sequence_length, StoredRow)
    if not rows:
        raise DataError(
            f"each of the {dropped} examples is longer than stage.sequence_length={stage.sequence_length}; "
            "raise it"
        )
    log.info(f"{len(examples) - dropped} responses in {len(rows)} rows; {dropped} are too long")
    steps = steps_in(len(rows), stage.batch_size, stage.epochs, stage.max_steps)
    engine = Engine(load_policy(run), stage.optim, stage.router, run.config.engine, steps)
    loss_of = divergence_loss(run, engine, stage.divergence, teacher=None)
    batches = epochs_of(run, rows, stage.batch_size)
    finish_stage(run, engine, train(run, engine, batches, steps, loss_of), data_hash)


def divergence_loss(
    run: Run[DistillConfig], engine: Engine, config: DivergenceConfig, teacher: FrozenTeacher | None
) -> Callable[[list[Packed]], LMLoss]:
    """What makes a batch's loss; without a `teacher`, from the probabilities that its rows hold."""
    return partial(
        DivergenceLoss,
        engine,
        mtp_weight=run.stage.mtp_weight,
        balance_weight=run.stage.router.balance_alpha,
        pad_id=run.chat.pad_id,
        config=config,
        teacher=teacher,
    )


# --- rows


@dataclass
class OwnRow(Packed):
    """A row of answers that the student has drawn."""


@dataclass
class StoredExample(Example):
    """A response with the teacher's probabilities of its T learned tokens, which stay on disk."""

    stored: Stored | Sequence[TopK]
    place: int  # among what is stored
    known: int  # learned tokens of which something is known

    @property
    def top(self) -> TopK:
        return self.stored[self.place]


@dataclass
class StoredRow(Packed):
    """A row of such examples."""

    examples: list[StoredExample] = field(default_factory=list)

    def add(self, example: Example) -> None:
        assert isinstance(example, StoredExample)
        super().add(example)
        self.examples.append(example)

    @property
    def known(self) -> int:
        """Learned tokens of which something is known."""
        return sum(one.known for one in self.examples)


def stored_examples(chat: Chat, folder: RunFolder) -> list[StoredExample]:
    """The responses of a run's dataset with their probabilities. Raises CheckpointError where they do not
    belong together."""
    dataset, stored, found = folder.dataset, Stored(folder.distributions), []
    for row in read_rows(dataset):
        example, place = chat.example(samples.prompt_of(row), row["response"]), row["distribution"]
        if place is None or place >= len(stored) or stored.tokens(place) != sum(example.loss):
            raise CheckpointError(
                f"{dataset} has no probabilities of the {sum(example.loss)} tokens of a response; remove it "
                "and repeat the command to ask the teacher again"
            )
        found.append(StoredExample(example.tokens, example.loss, stored, place, stored.known(place)))
    return found


@dataclass
class TeacherBatch(Batch):
    """A micro-batch with what the teacher thinks of its learned tokens."""

    teacher_ND: Tensor | None = None  # its hidden states before them
    # or what was stored: tokens, their log-probabilities, and those of all others together
    tokens_NK: Tensor | None = None
    logprobs_NK: Tensor | None = None
    rest_N: Tensor | None = None


def with_own_answers(
    run: Run[DistillConfig], engine: Engine, batches: Batches, step: int, position: Any
) -> Iterator[tuple[list[Packed], Any]]:
    """The batches, with a share of each one's rows answered by the student as it is by then."""
    assert run.stage.divergence is not None
    share_of = run.stage.divergence.on_policy
    for number, (rows, after) in enumerate(batches(step, position), step + 1):
        random = run.rng("on-policy rows", number)
        count = int(share_of * len(rows) + random.random())  # right on average
        chosen = sorted(random.choice(len(rows), size=count, replace=False).tolist())
        others = [row for place, row in enumerate(rows) if place not in chosen]
        yield others + own_rows(run, engine, [rows[place] for place in chosen], number), after


def own_rows(run: Run[DistillConfig], engine: Engine, rows: Sequence[Packed], step: int) -> list[Packed]:
    """The student's answers to the prompts of these rows, packed; before step `step`, and all ranks call."""
    assert run.stage.divergence is not None
    sampling, longest = run.stage.divergence.sampling, run.stage.sequence_length
    prompts = [prompt for row in rows for prompt in prompts_of(row) if len(prompt) < longest]
    if not prompts:
        return []
    mine = prompts[engine.rank :: engine.world_size]
    with run.phase("sampling"):
        run.sampler.update(engine, step - 1)
        params = SamplingParams(
            min(sampling.max_tokens, longest - 1),
            sampling.temperature,
            sampling.top_p,
            seed=run.seed("on-policy", step),
            first=engine.rank,
            stride=engine.world_size,
            max_num_seqs=sampling.max_num_seqs,
        )
        limits = [min(params.max_tokens, longest - len(prompt)) for prompt in mine]
        drawn = run.sampler.generate(mine, params, limits=limits)
        answers = [list(completion.tokens) for completion in drawn]
        of_ranks = engine.all_gather_objects(answers)
    examples = []
    for place, prompt in enumerate(prompts):
        answer = of_ranks[place % engine.world_size][place // engine.world_size]
        examples.append(Example(prompt + answer, [False] * len(prompt) + [True] * len(answer)))
    return pack(examples, longest, OwnRow)[0]


def prompts_of(row: Packed) -> list[list[int]]:
    """The tokens before the first learned one of each document."""
    segments, loss = np.array(row.segments, int), np.array(row.loss, bool)
    prompts = []
    for number in range(1, segments.max(initial=0) + 1):
        places = np.flatnonzero(segments == number)
        first = int(np.argmax(loss[places]))
        prompts.append([row.tokens[place] for place in places[:first]])
    return prompts


# --- the loss


class DivergenceLoss(LMLoss):
    """As LMLoss, with the divergence from the teacher in place of cross-entropy, mean over learned tokens."""

    def __init__(
        self,
        engine: Engine,
        batch: list[Packed],
        mtp_weight: float,
        balance_weight: float,
        pad_id: int,
        config: DivergenceConfig,
        teacher: FrozenTeacher | None,
    ):
        super().__init__(engine, batch, mtp_weight, balance_weight, pad_id)
        self.config, self.teacher = config, teacher
        if teacher is None:  # a mean over what is known
            self.learned = sum(row.known for row in batch if isinstance(row, StoredRow))
            self.per_learned = engine.world_size / max(1, self.learned)

    def _batches(self, micros: list[list[Packed]]) -> list[Any]:
        plain = [collate(rows, self.pad_id).to(self.engine.device) for rows in micros]
        batches = [TeacherBatch(*(getattr(batch, field.name) for field in fields(Batch))) for batch in plain]
        if self.teacher is None:
            return [
                replace(batch, **stored_of(rows, self.engine.device))
                for batch, rows in zip(batches, micros, strict=True)
            ]
        hidden = self.teacher.hidden(plain)
        return [replace(batch, teacher_ND=one) for batch, one in zip(batches, hidden, strict=True)]

    def _learn(
        self, model: Policy, batch: Any, hidden_BTD: Tensor, balances: tuple[Balance]
    ) -> tuple[Tensor, dict[str, float]]:
        def measure(logits_cV: Tensor, rows: slice) -> Tensor:
            """[c, 2]: the loss, and KL(teacher || student)."""
            return torch.stack(self._measured(logits_cV, batch, rows), -1)

        mtp = mtp_sum(model, batch, hidden_BTD, balances) if self.mtp_weight else None
        loss, kl = model.lm_head(learned(batch, hidden_BTD)[0], measure=measure).sum(0) * self.per_learned
        total, found = self._with_mtp(loss, mtp)
        return total, found | {KL: kl.item()}

    def _measured(self, logits_cV: Tensor, batch: Any, rows: slice) -> tuple[Tensor, Tensor]:
        if self.teacher is None:
            stored = batch.tokens_NK[rows], batch.logprobs_NK[rows], batch.rest_N[rows]
            return of_stored(logits_cV, *stored, self.config)
        with torch.no_grad():
            teacher_cV = self.teacher.head(batch.teacher_ND[rows])
        return of_vocabulary(logits_cV, teacher_cV, self.config)

    def terms(self, loss: float, passes: Sequence[Pass[Any]]) -> dict[str, float]:
        own = float(sum(row.learned for row in self.batch if isinstance(row, OwnRow)))
        return super().terms(loss, passes) | {TEACHER_TOKENS: float(self.learned), ON_POLICY: own}


def stored_of(rows: Sequence[Packed], device: torch.device) -> dict[str, Tensor]:
    """The fields of a TeacherBatch for rows with stored probabilities; rows without examples are empty."""
    tops = [one.top for row in rows if isinstance(row, StoredRow) for one in row.examples]

    def joined(arrays: list[np.ndarray], kind: type, empty: tuple[int, ...]) -> Tensor:
        whole = np.concatenate(arrays) if arrays else np.zeros(empty)
        return torch.from_numpy(whole.astype(kind)).to(device)

    return {
        "tokens_NK": joined([top.ids_TK for top in tops], np.int64, (0, 1)),
        "logprobs_NK": joined([top.logprobs_TK for top in tops], np.float32, (0, 1)),
        "rest_N": joined([top.rest_T for top in tops], np.float32, (0,)),
    }
