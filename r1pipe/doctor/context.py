"""Shared by the checks: limits, data, engine and probe. Each is created at its first use."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from r1pipe.chat.template import Chat
from r1pipe.config import DistillConfig, EvaluateConfig, RLConfig, SFTConfig
from r1pipe.config.fields import Strict, build
from r1pipe.config.groups import read
from r1pipe.core.errors import DataError, EnvironmentProblem
from r1pipe.core.types import Completion, Demonstration, Group, Prompt
from r1pipe.data import open_data
from r1pipe.data.source import Source
from r1pipe.rewards.custom import CustomRewards
from r1pipe.runs.findings import FAIL, PASS, WARN
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.ranks import choose_device
from r1pipe.train.loading import load_policy
from r1pipe.train.rl.ahead import LoopState
from r1pipe.train.rl.batch import Rollout, rollouts_of
from r1pipe.train.rl.loop import RLTrainer
from r1pipe.train.rl.routing import routing_agreement
from r1pipe.train.rl.scoring import RewardModels
from r1pipe.train.rl.stage import load_reward_models
from r1pipe.train.rl.update import update
from r1pipe.train.run import Run
from r1pipe.train.sft.rejection import samples_of

SEED = 0  # of the rows drawn from the data
HASHED = 8  # the last digits of a prompt's id, a hash of its question


class Outcome(NamedTuple):
    """What a check measured, as a status (PASS, WARN or FAIL) and a text; a pass needs no remedy."""

    status: str
    value: str
    remedy: str = ""


@dataclass
class Band(Strict):
    """The values beyond which a number is a warning or a failure; with `fail` below `warn`, low is bad."""

    warn: float
    fail: float

    def grade(self, number: float) -> str:
        sign = 1 if self.fail >= self.warn else -1
        if sign * number > sign * self.fail or math.isnan(number):
            return FAIL
        return WARN if sign * number > sign * self.warn else PASS


@dataclass
class Limits(Strict):
    """The values of conf/doctor/limits.yaml, which explains each."""

    rows: int
    judged: int
    probe_prompts: int
    probe_group: int
    probe_tokens: int
    probe_lr: float
    good_share: float
    swapped: float
    texts: int
    ngram: int
    common: int
    covered: float
    overlap: Band
    duplicates: Band
    too_long: Band
    truncation: Band
    variance: Band
    opens: Band
    logprob_gap: dict[str, Band]
    routing: Band
    memory: Band
    judgeable: Band
    refusals: Band
    judges_margin: float


def limits() -> Limits:
    return build(Limits, read("doctor/limits"), "doctor")


@dataclass(frozen=True)
class RowSet:
    """Rows whose questions are compared: of duplicates, or of training and evaluation."""

    rows: list[Demonstration]
    unit: str  # for messages: "rows" of files, or "rows drawn"
    note: str = ""  # for messages: which rows were left out


@dataclass
class Probe:
    """Scored completions of a few training prompts, also in the form that the update reads."""

    groups: list[Group]  # of all ranks
    rollouts: list[Rollout]  # this rank's


class Context:
    """One stage's config and temporary run folder, with all that its checks share."""

    def __init__(self, run: Run[Any], limits: Limits):
        self.run, self.config, self.limits = run, run.config, limits
        self.data_notes: list[str] = []  # about unusable rows, and splits that are too small

    @cached_property
    def chat(self) -> Chat:
        return self.run.load_chat()

    @cached_property
    def data(self) -> Source:
        note, screening = self.data_notes.append, self.config.screening
        return open_data(self.config.data, self.config.seed, report=note, screening=screening)

    @property
    def preference(self) -> Any:
        """The PreferenceConfig of an all-scenario stage; None for stages without reward models."""
        return getattr(self.config.stage, "preference", None)

    @cached_property
    def prompts(self) -> list[Prompt]:
        """Problems to train on, at most `limits.rows`; none for evaluation."""
        if isinstance(self.config.stage, EvaluateConfig):
            return []
        return self.data.prompts("train", self.limits.rows, SEED)

    @cached_property
    def general(self) -> list[Prompt]:
        """An all-scenario stage's general prompts, at most `limits.rows`; none for other stages."""
        if not self.preference:
            return []
        return self.data.general_prompts("train", self.limits.rows, SEED, self.preference.general_kinds)

    @cached_property
    def held_out(self) -> list[Prompt]:
        evaluation = self.config.stage.eval
        return self.data.prompts(evaluation.split, evaluation.problems, SEED)

    @cached_property
    def training_rows(self) -> RowSet:
        """The training split's problems, or the worked solutions that a fine-tuning stage draws."""
        return self.row_set("train", self.demonstrations or self.prompts)

    def row_set(self, split: str, drawn: Sequence[Prompt | Demonstration]) -> RowSet:
        """All of the split's rows in files, repeated questions included; without files, the rows drawn.

        Beyond `limits.texts` rows, every k-th question by its hash, which keeps all copies of a question.
        """
        rows = self.data.rows(split)
        if rows is None:
            as_rows = [row if isinstance(row, Demonstration) else Demonstration(row, "") for row in drawn]
            return RowSet(as_rows, "rows drawn")
        every = -(-len(rows) // self.limits.texts)
        if every <= 1:
            return RowSet(rows, "rows")
        kept = [row for row in rows if int(row.prompt.id[-HASHED:], 16) % every == 0]
        note = f"; only one question in {every} of {len(rows):,} is checked: texts in conf/doctor/limits.yaml"
        return RowSet(kept, "rows", note)

    @cached_property
    def demonstrations(self) -> list[Demonstration]:
        """A fine-tuning stage's examples, at most `limits.rows`; none where it has no examples yet."""
        stage = self.config.stage
        if isinstance(stage, DistillConfig):
            return [
                trace
                for parent in self.config.reads_from.values()
                for trace in samples_of(parent)[0][: self.limits.rows]
            ]
        if not isinstance(stage, SFTConfig):
            return []
        count = min(stage.demonstrations, self.limits.rows)
        return self.data.demonstrations(count, SEED, stage.styles, stage.correct_only)

    @cached_property
    def solved(self) -> list[Demonstration]:
        """A few correct worked solutions in the right format; none where the data has none."""
        try:
            return self.data.demonstrations(self.limits.judged, SEED, {}, True)
        except DataError:
            return []

    @cached_property
    def trial(self) -> Run[Any]:
        """The run with one small step, which moves weights visibly; RL's batch is cut down too."""
        stage, limits, ranks = self.config.stage, self.limits, self.config.engine.ranks
        rate = max(stage.optim.lr, limits.probe_lr)
        optim = replace(stage.optim, lr=rate, min_lr=rate, schedule="constant", warmup_steps=0, max_skipped=0)
        stage = replace(stage, optim=optim)
        if isinstance(stage, RLConfig):
            sampling = replace(stage.sampling, max_tokens=min(stage.sampling.max_tokens, limits.probe_tokens))
            stage = replace(
                stage,
                prompts_per_step=-(-limits.probe_prompts // ranks) * ranks,  # the same number on each rank
                group_size=min(stage.group_size, limits.probe_group),
                minibatches=1,
                inner_epochs=1,
                max_steps=1,
                routing_check_samples=limits.probe_group,
                sampling=sampling,
                preference=stage.preference and replace(stage.preference, last_steps=1),
            )
        return Run(self.run.folder, replace(self.config, stage=stage), stage)

    @cached_property
    def device(self) -> torch.device:
        """Where the job would compute. Raises EnvironmentProblem where that device is missing."""
        device = choose_device(self.config.engine.accelerator)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise EnvironmentProblem(
                "engine.accelerator=cuda, but torch sees no GPU; fix the driver or torch, or set "
                "engine.accelerator=cpu (engine=cpu)"
            )
        return device

    @cached_property
    def engine(self) -> Engine:
        """The policy in DeepSpeed, as the stage trains it, on this machine's ranks."""
        self.device  # noqa: B018 - its error is one line, DeepSpeed's many
        policy = load_policy(self.trial, freeze_mtp=isinstance(self.config.stage, RLConfig))
        stage = self.trial.stage
        return Engine(policy, stage.optim, stage.router, self.config.engine, total_steps=2)

    @cached_property
    def loop(self) -> RLTrainer:
        self.trial.chat, self.trial.data = self.chat, self.data
        custom = self.custom if self.custom.names else None
        return RLTrainer(self.trial, self.engine, None, self.reward_models, custom=custom)

    @cached_property
    def custom(self) -> CustomRewards:
        """An RL stage's custom rewards."""
        return CustomRewards(self.trial.stage.rewards)

    @cached_property
    def reward_models(self) -> RewardModels:
        self.trial.chat = self.chat
        return load_reward_models(self.trial) if self.preference else {}

    @cached_property
    def probe(self) -> Probe:
        """Drawn from the initial weights: use it before anything trains them."""
        return self.draw()

    def draw(self, step: int = 0) -> Probe:
        """Drawn from the weights that so many steps have made; the same prompts each time."""
        batch = self.loop.rollouts.take(LoopState(step))
        groups = batch.groups()
        with batch.verdicts as verdicts:
            self.loop.score(groups, verdicts)
        self.loop.rollouts.finished(step + 1)
        shares = self.engine.all_gather_objects(groups)
        return Probe([group for share in shares for group in share], rollouts_of(groups))

    @cached_property
    def trained(self) -> dict[str, float]:
        """The metrics of one optimizer step on the probe, and of its routing before."""
        # alternating advantages move the weights whatever the rewards are
        rollouts = [
            replace(rollout, advantage=1.0 if i % 2 else -1.0, scored=True)
            for i, rollout in enumerate(self.probe.rollouts)
        ]
        stage = self.trial.stage
        agreement = routing_agreement(self.engine, rollouts, stage, stage.routing_check_samples)
        return agreement | update(self.engine, rollouts, stage, None)


def completions_of(texts: Sequence[str]) -> list[Completion]:
    return [Completion([], [], "stop", text) for text in texts]
