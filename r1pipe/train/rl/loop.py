"""GRPO and PPO: prompts -> rollout -> score -> advantages -> update -> log (DeepSeekMath, alg. 1)."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from r1pipe.config import RLConfig
from r1pipe.core.errors import EnvironmentProblem, Tripped
from r1pipe.core.types import Group, Prompt
from r1pipe.data.source import prompt_fits
from r1pipe.model import Policy, save_pretrained
from r1pipe.model.training import set_batch_invariant
from r1pipe.rewards import Verdicts
from r1pipe.rewards.custom import CustomRewards
from r1pipe.runs import checkpoints, heartbeat, stopping
from r1pipe.train.engine.engine import Engine
from r1pipe.train.finish import quick_evaluation
from r1pipe.train.rl.batch import Rollout, rollouts_of
from r1pipe.train.rl.critic import Critic
from r1pipe.train.rl.prompts import POOL, PromptStream, general_count
from r1pipe.train.rl.routing import check_recorded, records, routing_agreement
from r1pipe.train.rl.rows import Row, rows_of_all, sample_of, speeds, summarise, too_many_failures, write_rows
from r1pipe.train.rl.scoring import (
    RewardModels,
    has_signal,
    redistribute_groups,
    reward_weights,
    score_groups,
)
from r1pipe.train.rl.tripwires import Trip, Tripwires, messages_of
from r1pipe.train.rl.update import Reference, update
from r1pipe.train.rollout import SamplingParams
from r1pipe.train.run import Run

Metrics = dict[str, float]
CRITIC = "critic"  # folder of the value model's engine within a checkpoint's engine state
ON_SCREEN = {"reward": "reward", "accuracy": "rewards/accuracy/mean", "length": "completions/mean_length"}


@dataclass
class LoopState:
    """What the loop remembers between steps; random streams are functions of the seed and the step."""

    step: int = 0  # finished steps
    reasoning_cursor: int = 0
    general_cursor: int = 0
    reference_step: int = 0  # the step whose policy is the reference; 0: the initial policy


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
    ):
        """Without a `reference` there is no KL. `reward_models` score general prompts; `custom`, all."""
        self.run, self.config, self.engine, self.reference = run, run.stage, engine, reference
        self.reward_models, self.critic, self.custom = reward_models, critic, custom
        if run.config.engine.equal:
            dtype = torch.float32 if run.config.engine.precision == "fp32" else torch.bfloat16
            set_batch_invariant(engine.module, True, dtype)
        self.more_engines = {CRITIC: critic.engine} if critic else {}
        self.weights = reward_weights(run.stage)
        self.tripwires = Tripwires(run.config.tripwires.wires, run.stage)
        self.state = LoopState()
        self.saved = 0  # the step of the newest checkpoint
        self.reasoning = self._stream(run.data.prompts, "reasoning prompts")
        self.general: PromptStream | None = None
        if preference := run.stage.preference:
            draw = partial(run.data.general_prompts, kinds=preference.general_kinds)
            self.general = self._stream(draw, "general prompts")

    def train(self) -> Path:
        """Train from the newest checkpoint (or the start) to the last step; the last checkpoint's folder."""
        if inactive := self.tripwires.describe_inactive():
            self.run.warn(inactive)
        self.saved, state = self.run.resume(self.engine, self.more_engines)
        if self.saved:
            self.state = LoopState(**state)
            for metrics in self.run.logged():  # wires that tripped before do not trip again
                self.tripwires.check(metrics)
            if self.reference and self.state.reference_step:
                engine_folder = self.run.folder.checkpoint(self.saved) / checkpoints.ENGINE
                self.reference.load(engine_folder / "reference")
        last = self.run.is_last(self.state.step, self.config.max_steps, self.engine)
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
        if self.critic:
            with self.run.phase("value", metrics):
                rollouts, value_metrics = self.critic.estimate(groups, self.reference)
            metrics |= value_metrics
        else:
            rollouts = rollouts_of(groups)
        with self.run.phase("reward", metrics):
            rows = rows_of_all(self.engine, groups, self.run.data.strategy_of)
            metrics |= summarise(rows)
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

    def next_prompts(self, metrics: Metrics) -> list[Prompt]:
        """This rank's share of a rollout batch's prompts; all ranks draw the same and advance the cursors."""
        config, state = self.config, self.state
        n = config.prompts_per_step
        n_general = general_count(config, state.step)
        before = state.reasoning_cursor + state.general_cursor
        reasoning, state.reasoning_cursor = self.reasoning.take(state.reasoning_cursor, n - n_general)
        general: list[Prompt] = []
        if self.general:
            general, state.general_cursor = self.general.take(state.general_cursor, n_general)
        too_long = float(state.reasoning_cursor + state.general_cursor - before - n)
        metrics["rollout/too_long"] = metrics.get("rollout/too_long", 0.0) + too_long
        prompts = reasoning + general
        if general:  # in random order, so that every rank and minibatch gets some of each
            prompts = [prompts[i] for i in self.run.rng("order", state.step).permutation(n)]
        return prompts[self.engine.rank :: self.engine.world_size]

    def _stream(self, draw: Callable[[str, int, int], list[Prompt]], name: str) -> PromptStream:
        config = self.config
        size = min(config.max_steps * config.prompts_per_step, POOL)
        context = self.engine.module.config.max_position_embeddings
        fits = prompt_fits(self.run.chat, context, config.sampling.max_tokens)
        return PromptStream(lambda pool: draw("train", size, self.run.seed(name, pool)), fits, name)

    # --- rollout and score

    def sample_groups(self, metrics: Metrics) -> list[Group]:
        """This rank's scored groups: one rollout batch or, with dynamic sampling, as many (at most
        `max_sampling_batches`) as it takes to get a batch of groups with a signal."""
        groups: list[Group] = []
        config, ranks = self.config, self.engine
        for batch in range(config.max_sampling_batches):
            with Verdicts() as verdicts:
                with self.run.phase("sampling", metrics), stopping.leaving_early(self.engine):
                    sampled = self.rollout(self.next_prompts(metrics), verdicts, batch)
                with self.run.phase("reward", metrics):
                    self.score(sampled, verdicts)
            for number, group in enumerate(sampled, len(groups)):
                group.place = ranks.rank + number * ranks.world_size
            groups += sampled
            if config.max_sampling_batches == 1:
                return groups
            metrics["rollout/batches"] = batch + 1.0
            with_signal = sum(has_signal(group, self.weights) for group in groups)
            if ranks.sum_over_ranks([with_signal])[0] >= config.prompts_per_step:
                break
        with self.run.phase("reward", metrics):
            return redistribute_groups(ranks, groups, self.weights, config.prompts_per_step)

    def rollout(self, prompts: list[Prompt], verdicts: Verdicts, batch: int = 0) -> list[Group]:
        """Sample G completions of each prompt; checking the answers starts as they finish."""
        sampling, size = self.config.sampling, self.config.group_size
        params = SamplingParams(
            sampling.max_tokens,
            sampling.temperature,
            sampling.top_p,
            size,
            self.run.seed(f"sampling/{batch}", self.state.step),
            first=self.engine.rank,
            stride=self.engine.world_size,
            max_num_seqs=sampling.max_num_seqs,
            record_experts=records(self.config),
        )
        chat, ranks, sampler = self.run.chat, self.engine.world_size, self.run.sampler
        tokens = [chat.prompt_tokens(prompt) for prompt in prompts]

        def progress(done: int, total: int) -> None:
            self.run.progress("sampling", done * ranks, total * ranks, "completions")

        sampler.update(self.engine, self.state.step)
        ended = verdicts.on_completion(chat, prompts)
        completions = sampler.generate(tokens, params, progress, ended, stop=stopping.requested)
        if self.config.replay_routing:
            check_recorded(completions)
        return [
            Group(prompt, completions[i * size : (i + 1) * size], prompt_tokens=tokens[i])
            for i, prompt in enumerate(prompts)
        ]

    def score(self, groups: list[Group], verdicts: Verdicts) -> None:
        """Set the groups' scores, rewards and group-relative advantages."""
        kls = None
        if self.reference and self.config.kl_in == "reward" and not self.critic:  # PPO: KL of each token
            rollouts = [
                Rollout(group.prompt_tokens, c, 0.0, True) for group in groups for c in group.completions
            ]
            self.reference.estimate_kl(rollouts, self.config)
            kls = [rollout.kl() for rollout in rollouts]
        score_groups(groups, self.config, self.weights, self.reward_models, kls, verdicts, self.custom)

    # --- log and save

    def _end_step(self, rows: list[Row], metrics: Metrics, began: float) -> bool:
        """Replace the reference, evaluate, log and save when due; whether training ends."""
        config, state = self.config, self.state
        state.step += 1
        if self.reference and config.reference_every and state.step % config.reference_every == 0:
            self.reference.replace_by(self.engine)
            state.reference_step = state.step
        if config.eval.every and state.step % config.eval.every == 0 and state.step < config.max_steps:
            metrics |= quick_evaluation(self.run, self.engine, state.step)
        trips = self._log(state.step, rows, metrics, began)
        shown = {name: metrics[key] for name, key in ON_SCREEN.items() if key in metrics}
        self.run.progress("train", state.step, config.max_steps, "steps", **shown)
        if stop := messages_of(trips, "stop"):
            raise Tripped(f"stopped in step {state.step}, which is not saved: {stop}")
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
        if before.step > self.saved:
            self._save()

    def _save(self) -> None:
        self.saved = self.state.step
        self.run.save_checkpoint(self.engine, self.saved, asdict(self.state), self._export, self.more_engines)

    def _export(self, policy: Policy, folder: Path) -> None:
        save_pretrained(policy, folder)
        if self.reference and self.state.reference_step:
            self.reference.save(folder / checkpoints.ENGINE / "reference")
