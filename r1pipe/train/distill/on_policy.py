"""Reinforcement of a student: by the teacher's probabilities of what it draws, or by what is right.

On-policy distillation (Thinking Machines Lab, 2025; MiniLLM, arXiv 2306.08543): the student draws, and each
token's advantage is the teacher's log-probability of it less the student's. All else is the loop of
train/rl.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from itertools import chain
from typing import Any, cast

import numpy as np
from torch import Tensor

from r1pipe.config import DistillConfig, RLConfig
from r1pipe.config.fields import check_all
from r1pipe.config.transfer import as_rl, in_distillation, transfer_rules
from r1pipe.core.errors import R1pipeError
from r1pipe.core.types import Completion, Prompt, Score, Status
from r1pipe.data.source import Source
from r1pipe.runs.files import read_object, write_json
from r1pipe.train.distill.losses import teacher_advantages
from r1pipe.train.distill.teacher import load_teacher
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.extract.feedback import likelihood_scores, rated
from r1pipe.train.extract.teacher import TeacherGenerator
from r1pipe.train.rl.batch import Rollout, by_prompt, collate
from r1pipe.train.rl.stage import load_custom_rewards, reinforce
from r1pipe.train.rl.update import Reference
from r1pipe.train.run import Run

REVERSE_KL = "distill/reverse_kl"  # nats a token from student to teacher, estimated on what was drawn (k1)
TEACHER = "teacher"  # the name of its score among the rewards
TEACHER_TOKENS = "distill/teacher_tokens"  # drawn tokens that the teacher has read


def reinforce_student(run: Run[DistillConfig], prompts: Sequence[Prompt], data_hash: str) -> None:
    """From the loaded data to the record. `prompts` are asked in place of the data's own, and `data_hash` is
    theirs."""
    config, teacher_from = run.stage.rl, run.config.teacher_from
    assert config is not None
    run.data = with_prompts(run.data, prompts)
    check_all(transfer_rules(run.stage, run.world_size))  # a hostfile's machines times engine.ranks
    # it is asked as distillation has it, while the run goes on as reinforcement
    scorer = TeacherScorer(copy(run), config.score_weight) if config.score_weight else None
    as_reinforcement = cast(Run[RLConfig], run)
    as_reinforcement.stage = as_rl(run.stage)
    custom = load_custom_rewards(as_reinforcement)
    teacher = None
    if config.teacher_coef:
        assert teacher_from is not None
        model = Reference(load_teacher(run, teacher_from), run.config.engine)
        teacher = TeacherAdvantages(
            model, as_reinforcement.stage, config.teacher_coef, config.teacher_discount
        )
    with naming_its_keys():
        reinforce(as_reinforcement, custom, teacher, data_hash, scorer)


@contextmanager
def naming_its_keys() -> Iterator[None]:
    """Errors of reinforcement name its keys where a distillation has them."""
    try:
        yield
    except R1pipeError as error:
        error.args = (in_distillation(str(error)), *error.args[1:])
        raise


class TeacherAdvantages:
    """Gives the tokens that the student has drawn advantages, in proportion to how likely it finds them."""

    def __init__(self, model: Reference, config: RLConfig, coef: float, discount: float):
        self.model, self.config, self.coef, self.discount = model, config, coef, discount
        self.ranks: Ranks = model.frozen

    def set_advantages(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Set each token's advantage: the completion's, and the teacher's less its mean over the batch, a
        baseline that changes the gradient's noise and not its mean. All ranks call."""
        batches = by_prompt(rollouts, self.config.max_tokens_per_micro_batch)
        micros = [collate(rows, None, 0.0, self.model.device) for rows in batches]
        found = self.model.logprobs(micros, self.config.sampling.temperature)
        gap, total = 0.0, 0.0
        of_teacher: list[tuple[Rollout, Tensor]] = []
        for rows, micro, teacher_N in zip(batches, micros, found, strict=True):
            gap += (micro.old_N - teacher_N).sum().item()
            lengths = micro.lengths_B.tolist()
            of_rows = zip(micro.old_N.split(lengths), teacher_N.split(lengths), strict=True)
            for rollout, (old_T, teacher_T) in zip(rows, of_rows, strict=True):
                advantages_T = teacher_advantages(old_T, teacher_T, self.coef, self.discount)
                total += advantages_T.sum().item()
                of_teacher.append((rollout, advantages_T))
        tokens = sum(len(advantages_T) for _, advantages_T in of_teacher)
        gap, total, whole = self.ranks.sum_over_ranks([gap, total, float(tokens)])
        baseline = total / max(1.0, whole)
        for rollout, advantages_T in of_teacher:
            rollout.advantages = (rollout.advantage + advantages_T - baseline).tolist()
        return {REVERSE_KL: gap / max(1.0, whole), TEACHER_TOKENS: whole}


class TeacherScorer:
    """The teacher's score of each answer as a reward (train/rl/scoring.BatchScorer): a rating that it writes
    by a rubric, or the likelihood that it gives the answer. A rating is asked for once, however often a step
    is repeated."""

    def __init__(self, run: Run[DistillConfig], weight: float):
        self.weights, self.by = {TEACHER: weight}, run.stage.feedback.by
        self.ranks = Ranks(run.config.engine)
        self.teacher = TeacherGenerator(run, self.ranks)

    def score(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Score]:
        """What cannot be read, or is too long for the teacher, counts as a failed verdict."""
        pairs = [*zip(prompts, completions, strict=True)]
        if self.by == "likelihood":
            found = likelihood_scores(self.teacher.local, pairs)
        else:  # all ranks ask for the same
            of_ranks = self.ranks.all_gather_objects(pairs)
            first = sum(map(len, of_ranks[: self.ranks.rank]))
            found = rated(self.teacher, [*chain.from_iterable(of_ranks)])[first : first + len(pairs)]
        unread = Score(0.0, Status.VERIFIER_FAILED, "the teacher gave no score")
        return [unread if score is None else Score(score) for score in found]

    def finish(self) -> None:
        """Write down what its ratings have cost."""
        if self.ranks.rank == 0:
            path = self.teacher.run.folder.teacher
            write_json(path, self.teacher.facts(read_object(path)["prompts"]))
        self.teacher.close()


def with_prompts(source: Source, prompts: Sequence[Prompt]) -> Source:
    """The source with these training prompts in place of its own: in a random order for each seed."""

    def draw(split: str, n: int, seed: int) -> list[Prompt]:
        if split != "train":
            return source.prompts(split, n, seed)
        order = np.random.default_rng(seed).permutation(len(prompts))
        return [prompts[i] for i in order[:n]]

    changed: Any = copy(source)
    changed.prompts = draw
    return changed
