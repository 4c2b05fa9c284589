"""What the checks look at: made when first asked for, so that a stage pays only for its own checks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from r1pipe.chat.template import Chat
from r1pipe.config import DistillConfig, FineTuneConfig, RLConfig, RunConfig, SFTConfig
from r1pipe.config.fields import Strict, build
from r1pipe.config.groups import read
from r1pipe.core.errors import DataError, EnvironmentProblem
from r1pipe.core.types import Demonstration, Group, Prompt
from r1pipe.data.opening import open_data
from r1pipe.data.source import Source
from r1pipe.rewards import Verdicts
from r1pipe.runs.findings import FAIL, PASS, WARN, Finding
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.ranks import choose_device
from r1pipe.train.rl.batch import Rollout, rollouts_of
from r1pipe.train.rl.loop import GRPO, LoopState
from r1pipe.train.rl.scoring import Judges
from r1pipe.train.rl.stage import reward_models
from r1pipe.train.rl.update import update
from r1pipe.train.run import Run
from r1pipe.train.sft.rejection import samples_of

SEED = 0  # of what is drawn from the data
HASHED = 8  # last digits of a prompt's id that are looked at, a hash of its question


@dataclass
class Band(Strict):
    """From where on a number is a warning or a failure; where `fail` is less than `warn`, low is bad."""

    warn: float
    fail: float

    def grade(self, number: float) -> str:
        sign = 1 if self.fail >= self.warn else -1
        if sign * number > sign * self.fail or math.isnan(number):
            return FAIL
        return WARN if sign * number > sign * self.warn else PASS


@dataclass
class Limits(Strict):
    """conf/doctor/limits.yaml, where each is explained."""

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


def graded(name: str, number: float, band: Band, value: str, remedy: str) -> Finding:
    """A finding whose verdict is the band's; the remedy only where there is something to mend."""
    status = band.grade(number)
    return Finding(name, status, value, "" if status == PASS else remedy)


@dataclass(frozen=True)
class Texts:
    """Problems that are compared with one another, as texts alone."""

    rows: list[Demonstration]
    kind: str  # how they are told: "rows" of files, or "rows drawn"
    limit: str = ""  # what was left out, told


@dataclass
class Probe:
    """Completions of a few training prompts, scored, and as the update reads them."""

    groups: list[Group]  # of all ranks
    rollouts: list[Rollout]  # this rank's


class Context:
    """One stage's config with its temporary run folder, and what the checks share."""

    def __init__(self, run: Run[Any], limits: Limits):
        self.run, self.config, self.limits = run, run.config, limits
        self.data_notes: list[str] = []  # lines about rows that cannot be used, and splits that are too small

    @cached_property
    def chat(self) -> Chat:
        return self.run.load_chat()

    @cached_property
    def data(self) -> Source:
        return open_data(self.config.data, self.config.seed, report=self.data_notes.append)

    @cached_property
    def prompts(self) -> list[Prompt]:
        """Problems to train on, at most `limits.rows`."""
        return self.data.prompts("train", self.limits.rows, SEED)

    @cached_property
    def general(self) -> list[Prompt]:
        """What an all-scenario stage draws besides, at most `limits.rows`; none for other stages."""
        preference = getattr(self.config.stage, "preference", None)
        if preference is None:
            return []
        return self.data.general_prompts("train", self.limits.rows, SEED, preference.general_kinds)

    @cached_property
    def held_out(self) -> list[Prompt]:
        """The problems that the stage is evaluated on."""
        evaluation = self.config.stage.eval
        return self.data.prompts(evaluation.split, evaluation.problems, SEED)

    @cached_property
    def learned_texts(self) -> Texts:
        """The problems of the training split, or worked solutions that a fine-tuning stage draws."""
        return self._texts("train", self.demonstrations or self.prompts)

    @cached_property
    def held_out_texts(self) -> Texts:
        return self._texts(self.config.stage.eval.split, self.held_out)

    def _texts(self, split: str, drawn: Sequence[Prompt | Demonstration]) -> Texts:
        """All that files have in a split, before repeated questions are left out; otherwise what was drawn.

        Beyond `limits.texts` rows they are those of every k-th question, by its hash: with all its copies.
        """
        rows = self.data.rows(split)
        if rows is None:
            return Texts(
                [x if isinstance(x, Demonstration) else Demonstration(x, "") for x in drawn], "rows drawn"
            )
        every = -(-len(rows) // self.limits.texts)
        if every <= 1:
            return Texts(rows, "rows")
        kept = [row for row in rows if int(row.prompt.id[-HASHED:], 16) % every == 0]
        limit = f"; of {len(rows):,} every {every}th question is looked at: texts in conf/doctor/limits.yaml"
        return Texts(kept, "rows", limit)

    @cached_property
    def demonstrations(self) -> list[Demonstration]:
        """What a fine-tuning stage learns from, at most `limits.rows`; none for other stages.

        Rejection sampling makes its own, of prompts.
        """
        stage = self.config.stage
        if isinstance(stage, DistillConfig):
            return [
                trace
                for parent in self.config.reads_from.values()
                for trace in samples_of(parent)[0][: self.limits.rows]
            ]
        if not isinstance(stage, SFTConfig):
            return []
        wanted = min(stage.demonstrations, self.limits.rows)
        return self.data.demonstrations(wanted, SEED, stage.styles, stage.correct_only)

    @cached_property
    def solved(self) -> list[Demonstration]:
        """A few right, worked solutions in the right format; none where the data has none."""
        try:
            return self.data.demonstrations(self.limits.judged, SEED, {}, True)
        except DataError:
            return []

    @cached_property
    def trial(self) -> Run[Any]:
        """The run as the probe sees it: short, without a reference, and with a step that shows."""
        return Run(self.run.folder, small := shortened(self.config, self.limits), small.stage)

    @cached_property
    def device(self) -> torch.device:
        """Where the job would compute. Raises EnvironmentProblem where that is not there."""
        device = choose_device(self.config.engine.accelerator)
        if device.type == "cuda" and not torch.cuda.is_available():
            raise EnvironmentProblem(
                "engine.accelerator=cuda, but torch sees no GPU; mend driver or torch, or set "
                "engine.accelerator=cpu (engine=cpu)"
            )
        return device

    @cached_property
    def engine(self) -> Engine:
        """The policy in DeepSpeed, as the stage trains it, on this machine's ranks."""
        self.device  # noqa: B018 - it tells in one line what DeepSpeed would tell in many
        policy = self.trial.load_model(self.config.weights_from)
        if isinstance(self.config.stage, RLConfig):
            policy.freeze_mtp()
        stage = self.trial.stage
        return Engine(policy, stage.optim, stage.router, self.config.engine, total_steps=2)

    @cached_property
    def loop(self) -> GRPO:
        return GRPO(self.trial, self.engine, None, self.chat, self.data, self.judges, dict)

    @cached_property
    def judges(self) -> Judges:
        """The reward models of an all-scenario stage."""
        return reward_models(self.trial, self.chat) if self.trial.stage.preference else {}

    @cached_property
    def probe(self) -> Probe:
        """Drawn from the weights as they are: to be asked for before anything trains them."""
        return self.draw()

    def draw(self) -> Probe:
        self.loop.state = LoopState()  # the same prompts each time
        prompts = self.loop.next_prompts({})
        with Verdicts() as verdicts:
            tokens, completions = self.loop.rollout(prompts, verdicts)
            groups = self.loop.score(prompts, tokens, completions, verdicts)
        shares = self.engine.all_gather_objects(groups)
        return Probe([group for share in shares for group in share], rollouts_of(groups, tokens))

    @cached_property
    def trained(self) -> dict[str, float]:
        """The metrics of one optimizer step on the probe."""
        # every second completion up, every other down: a step that moves weights, whatever was earned
        turned = [
            replace(rollout, advantage=1.0 if i % 2 else -1.0, scored=True)
            for i, rollout in enumerate(self.probe.rollouts)
        ]
        return update(self.engine, turned, self.trial.stage, None)


def shortened(config: RunConfig, limits: Limits) -> RunConfig:
    """The config with a stage of one small step; other than RL's only the learning rate is touched."""
    stage, ranks = config.stage, config.engine.ranks
    rate = max(stage.optim.lr, limits.probe_lr)
    optim = replace(stage.optim, lr=rate, min_lr=rate, schedule="constant", warmup_steps=0, max_skipped=0)
    stage = replace(stage, optim=optim)
    if isinstance(stage, RLConfig):
        sampling = replace(stage.sampling, max_tokens=min(stage.sampling.max_tokens, limits.probe_tokens))
        stage = replace(
            stage,
            prompts_per_step=-(-limits.probe_prompts // ranks) * ranks,  # shared out evenly
            group_size=min(stage.group_size, limits.probe_group),
            minibatches=1,
            inner_epochs=1,
            max_steps=1,
            sampling=sampling,
            preference=stage.preference and replace(stage.preference, last_steps=1),
        )
    return replace(config, stage=stage)


def learns_from_demonstrations(config: RunConfig) -> bool:
    """Whether the stage packs examples of `sequence_length` tokens."""
    return isinstance(config.stage, FineTuneConfig)
