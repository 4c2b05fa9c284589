"""GRPO and PPO: prompts -> rollout -> score -> advantages -> update -> log (DeepSeekMath, alg. 1)."""

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Protocol

import pyarrow as pa
import torch

from r1pipe.config import DistillConfig, RLConfig
from r1pipe.config.transfer import in_distillation
from r1pipe.core.errors import EnvironmentProblem, SamplerLost, Tripped
from r1pipe.core.types import Group
from r1pipe.data.identity import Claims
from r1pipe.model.training import set_batch_invariant
from r1pipe.rewards import Verdicts
from r1pipe.rewards.custom import CustomRewards
from r1pipe.runs import checkpoints, heartbeat, stopping
from r1pipe.train.engine.engine import Engine
from r1pipe.train.finish import quick_evaluation
from r1pipe.train.resumable import Saved
from r1pipe.train.rl import in_flight
from r1pipe.train.rl.ahead import LoopState, RolloutQueue, staleness
from r1pipe.train.rl.batch import Rollout, rollouts_of
from r1pipe.train.rl.critic import Critic
from r1pipe.train.rl.routing import routing_agreement
from r1pipe.train.rl.rows import Row, rows_of_all, sample_of, speeds, summarise, too_many_failures, write_rows
from r1pipe.train.rl.scoring import (
    BatchScorer,
    RewardModels,
    has_signal,
    redistribute_groups,
    reward_weights,
    score_groups,
)
from r1pipe.train.rl.tripwires import Trip, Tripwires, messages_of
from r1pipe.train.rl.truth import hidden_truth
from r1pipe.train.rl.update import Reference, update
from r1pipe.train.run import Run

Metrics = dict[str, float]
# folders within a checkpoint's engine state
CRITIC = "critic"  # the value model's engine
REFERENCE = "reference"  # what has replaced the first one
NO_VARIANCE = "frac_reward_zero_std"
TRIES = 3  # of a step whose completions could not be drawn
ON_SCREEN = {"reward": "reward", "accuracy": "rewards/accuracy/mean", "length": "completions/mean_length"}


class TokenAdvantages(Protocol):
    """What gives each token an advantage of its own besides the completion's: a teacher."""

    def set_advantages(self, rollouts: Sequence[Rollout]) -> Metrics:
        """Set the `advantages` of this rank's rollouts; returns what is logged, of all ranks. All ranks
        call."""


class RLTrainer:
    """The training loop of one stage; with a critic it is PPO."""

    def __init__(
        self,
        run: Run[RLConfig],
        engine: Engine,
        reference: Reference | None,
        reward_models: RewardModels,
        critic: Critic | None = None,
        custom: CustomRewards | None = None,
        teacher: TokenAdvantages | None = None,
        scorer: BatchScorer | None = None,
    ):
        """Without a `reference` there is no KL. `reward_models` score general prompts; `custom` and `scorer`,
        all."""
        self.run, self.config, self.engine, self.reference = run, run.stage, engine, reference
        self.reward_models, self.critic, self.custom = reward_models, critic, custom
        self.teacher, self.scorer = teacher, scorer
        if run.config.engine.equal:
            dtype = torch.float32 if run.config.engine.precision == "fp32" else torch.bfloat16
            set_batch_invariant(engine.module, True, dtype)
        self.more_engines = {CRITIC: critic.engine} if critic else {}
        self.weights = reward_weights(run.stage) | (scorer.weights if scorer else {})
        is_distilled = isinstance(run.config.stage, DistillConfig)
        self.tripwires = Tripwires(
            run.config.tripwires.wires, run.stage, in_distillation if is_distilled else str
        )
        self.claims = Claims(run.config.screening.identity)
        self.state = LoopState()
        self.saved = 0  # the step of the newest checkpoint
        self.failures = 0  # of the sampler, one after another
        self.rollouts = RolloutQueue(run, engine)

    def train(self) -> Path:
        """Train from the newest checkpoint (or the start) to the last step; the last checkpoint's folder."""
        if inactive := self.tripwires.describe_inactive():
            self.run.warn(inactive)
        self.saved, state = self.run.resume(self.engine, self.more_engines)
        if self.saved:
            self.state = LoopState(**state)
            self.rollouts.resume(self.state, self.run.folder.checkpoint(self.saved) / checkpoints.ENGINE)
            for metrics in self.run.logged():  # wires that tripped before do not trip again
                self.tripwires.check(metrics)
            if self.reference and self.state.reference_step:
                engine_folder = self.run.folder.checkpoint(self.saved) / checkpoints.ENGINE
                self.reference.load(engine_folder / REFERENCE)
        elif self.config.eval.every:  # what the steps are held against
            quick_evaluation(self.run, self.engine, self.engine, 0)
        last = self.run.is_last(self.state.step, self.config.max_steps, self.engine)
        with closing(self.rollouts):
            while not last:
                last = self.step()
        return self.run.folder.checkpoint(self.state.step)

    def step(self) -> bool:
        """Sample G completions for each of P prompts, score them, update; whether it was the last step."""
        began = time.monotonic()
        metrics: Metrics = {}
        before = replace(self.state)
        heartbeat.at_step(before.step + 1)
        try:
            groups = self.sample_groups(metrics)
        except stopping.Interrupted:
            self._abandon_step(before)
            raise
        except SamplerLost as problem:
            self._abandon_step(before)
            self.failures += 1
            stopping.stop_if_requested(self.engine)
            if not problem.again or self.failures == TRIES:
                raise
            self.run.warn(f"step {before.step + 1} is taken again: {problem}")
            return False
        self.failures = 0
        if self.rollouts.ahead:
            metrics |= staleness(self.engine, groups, before.step)
        rollouts = self.rollouts_of(groups, metrics)
        with self.run.phase("reward", metrics):
            rows = rows_of_all(self.engine, groups, self.run.data.strategy_of)
            metrics |= summarise(rows)
            metrics["completions/identity_claims"] = fmean(
                bool(self.claims.found(row["completion"])) for row in rows
            )
            metrics |= hidden_truth(self.engine, groups, self.run.data.truth)
        if failure := too_many_failures(metrics, self.config.rewards.max_failed, rows):
            self._log(before.step + 1, rows, metrics, began)
            self._abandon_step(before)
            raise EnvironmentProblem(f"step {before.step + 1} trains nothing: {failure}")
        if self.config.ppo is None or self.state.step >= self.config.ppo.value_warmup_steps:
            with self.run.phase("update", metrics):
                if count := self.config.routing_check_samples:
                    metrics |= routing_agreement(self.engine, rollouts, self.config, count)
                metrics |= update(self.engine, rollouts, self.config, self.reference)
            [tokens] = self.engine.sum_over_ranks([sum(map(len, rollouts)) * self.config.inner_epochs])
            metrics["train/tokens_per_s"] = tokens / metrics["time/update_s"]
        if self.critic:
            with self.run.phase("value", metrics):
                metrics |= self.critic.learn(rollouts)
        return self._end_step(rows, metrics, began)

    # --- rollout and score

    def sample_groups(self, metrics: Metrics) -> list[Group]:
        """This rank's scored groups: one rollout batch or, with dynamic sampling, as many (at most
        `max_sampling_batches`) as it takes to get a batch of groups with a signal."""
        groups: list[Group] = []
        config, ranks = self.config, self.engine
        for number in range(config.max_sampling_batches):
            with self.run.phase("sampling", metrics):
                batch = self.rollouts.take(self.state, number)
            metrics["rollout/too_long"] = metrics.get("rollout/too_long", 0.0) + batch.too_long
            sampled = batch.groups()
            with batch.verdicts as verdicts, self.run.phase("reward", metrics):
                self.score(sampled, verdicts)
            for place, group in enumerate(sampled, len(groups)):
                group.place = ranks.rank + place * ranks.world_size
            groups += sampled
            if config.max_sampling_batches == 1:
                return groups
            metrics["rollout/batches"] = number + 1.0
            with_signal = sum(has_signal(group, self.weights) for group in groups)
            if ranks.sum_over_ranks([with_signal])[0] >= config.prompts_per_step:
                break
        with self.run.phase("reward", metrics):
            return redistribute_groups(ranks, groups, self.weights, config.prompts_per_step)

    def score(self, groups: list[Group], verdicts: Verdicts) -> None:
        """Set the groups' scores, rewards and group-relative advantages."""
        kls = None
        if self.reference and self.config.kl_in == "reward" and not self.critic:  # PPO: KL of each token
            rollouts = [
                Rollout(group.prompt_tokens, c, 0.0, True) for group in groups for c in group.completions
            ]
            self.reference.estimate_kl(rollouts, self.config)
            kls = [rollout.kl() for rollout in rollouts]
        scorers = self.reward_models, kls, verdicts, self.custom, self.scorer
        score_groups(groups, self.config, self.weights, *scorers)

    def rollouts_of(self, groups: list[Group], metrics: Metrics) -> list[Rollout]:
        """What is trained on, with each token's advantage where a value model or a teacher gives one."""
        if self.critic:
            with self.run.phase("value", metrics):
                rollouts, value_metrics = self.critic.estimate(groups, self.reference)
            metrics |= value_metrics
        else:
            rollouts = rollouts_of(groups)
        if self.teacher:
            with self.run.phase("teacher", metrics):
                metrics |= self.teacher.set_advantages(rollouts)
        return rollouts

    # --- log and save

    def _end_step(self, rows: list[Row], metrics: Metrics, began: float) -> bool:
        """Replace the reference, evaluate, log and save when due; whether training ends."""
        config, state = self.config, self.state
        state.step += 1
        self.rollouts.finished(state.step)
        if self.reference and config.reference_every and state.step % config.reference_every == 0:
            self.reference.replace_by(self.engine)
            state.reference_step = state.step
        if config.eval.every and state.step % config.eval.every == 0 and state.step < config.max_steps:
            metrics |= quick_evaluation(self.run, self.engine, self.engine, state.step)
        trips = self._log(state.step, rows, metrics, began)
        shown = {name: metrics[key] for name, key in ON_SCREEN.items() if key in metrics}
        self.run.progress("train", state.step, config.max_steps, "steps", **shown)
        if stop := messages_of(trips, "stop"):
            raise Tripped(f"stopped in step {state.step}, which is not saved: {stop}")
        self.run.check_saved(self.engine)
        last = self.run.is_last(state.step, config.max_steps, self.engine)
        pause, leaving = messages_of(trips, "pause"), stopping.agreed(self.engine)
        if last or pause or leaving or (config.save_every and state.step % config.save_every == 0):
            self._save()
        if pause and not last:
            raise Tripped(f"paused after step {state.step}; the same command resumes from it: {pause}")
        if leaving and not last:
            raise stopping.Interrupted(leaving)
        return last

    def _log(self, step: int, rows: list[Row], metrics: Metrics, began: float) -> list[Trip]:
        """Write rollouts, and metrics with speeds and trips; the step `began` at this monotonic time."""
        if self.teacher:  # groups of equal rewards teach, too
            metrics.pop(NO_VARIANCE, None)
        if self.engine.rank == 0:
            write_rows(rows, self.run.folder.rollouts / f"step-{step}.parquet")
        metrics |= speeds(rows, metrics, time.monotonic() - began)
        trips = self.engine.all_gather_objects(self.tripwires.check(metrics))[0]  # ranks differ in times
        for trip in trips:
            metrics[f"tripwire/{trip.name}"] = trip.value
            self.run.tripped(step, trip.name, trip.message)
        self.run.log(step, metrics)
        self.run.show(sample=sample_of(rows, self.run.rng("shown", step)))
        return trips

    def _abandon_step(self, before: LoopState) -> None:
        """Return to the state before the step, saved if it was not yet; a resumed run repeats the step."""
        self.state = before
        self.rollouts.abandon(before)
        if before.step > self.saved:
            self._save()

    def _save(self) -> None:
        self.saved = self.state.step
        waiting, completions = self.rollouts.saved()
        state, more = asdict(replace(self.state, waiting=waiting)), partial(self._write, completions)
        others: dict[str, Saved] = {**self.more_engines}
        if self.reference and self.state.reference_step:
            others[REFERENCE] = self.reference
        self.run.save_checkpoint(self.engine, self.saved, state, others=others, more=more)

    def _write(self, completions: pa.Table, folder: Path) -> None:
        in_flight.write(completions, folder / checkpoints.ENGINE)
