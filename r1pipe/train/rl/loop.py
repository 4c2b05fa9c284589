"""The loop of GRPO and PPO: prompts -> rollout -> score -> advantages -> update (DeepSeekMath, alg. 1)."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from r1pipe.chat.template import Chat
from r1pipe.config import RLConfig
from r1pipe.core.errors import EnvironmentProblem, Tripped
from r1pipe.core.types import Completion, Group, Prompt
from r1pipe.data.fitting import prompt_fits
from r1pipe.data.source import Source
from r1pipe.model import DeepseekV3, save_pretrained
from r1pipe.rewards import ShapingInputs, Verdicts
from r1pipe.runs import heartbeat, stopping
from r1pipe.runs.checkpoints import ENGINE
from r1pipe.runs.stopping import Interrupted
from r1pipe.train.engine.engine import Engine
from r1pipe.train.rl.batch import Rollout, rollouts_of
from r1pipe.train.rl.critic import Critic
from r1pipe.train.rl.prompts import PromptStream, general_count, mixed
from r1pipe.train.rl.routing import routing_agreement
from r1pipe.train.rl.rows import Row, rows_of_all, summarise, too_many_failures
from r1pipe.train.rl.scoring import Judges, reward_weights, score_groups
from r1pipe.train.rl.shaping import has_signal, kl_of_completions, redistribute_groups
from r1pipe.train.rl.step_log import log_step
from r1pipe.train.rl.tripwires import Tripwires, asking
from r1pipe.train.rl.update import Reference, update
from r1pipe.train.rollout import Sampler, SamplingParams
from r1pipe.train.run import Run

Metrics = dict[str, float]
CRITIC = "critic"  # the folder of the value model's engine within a checkpoint's state for resume
ON_SCREEN = {"reward": "reward", "accuracy": "rewards/accuracy/mean", "length": "completions/mean_length"}


@dataclass
class LoopState:
    """All that the loop remembers between steps; random streams are functions of the seed and the step."""

    step: int = 0  # finished steps
    reasoning_cursor: int = 0
    general_cursor: int = 0
    reference_step: int = 0  # the step whose policy is the reference; 0: the stage's beginning


class GRPO:
    """One stage's loop and what it works with."""

    def __init__(
        self,
        run: Run[RLConfig],
        engine: Engine,
        reference: Reference | None,
        chat: Chat,
        data: Source,
        judges: Judges,
        quick_evaluation: Callable[[], Metrics],
        critic: Critic | None = None,
    ):
        """`judges` score general prompts; without a `reference` there is no KL; with a `critic` it is PPO."""
        self.run, self.config, self.engine, self.reference = run, run.stage, engine, reference
        self.chat, self.data, self.judges, self.quick_evaluation = chat, data, judges, quick_evaluation
        self.critic, self.beside = critic, {CRITIC: critic.engine} if critic else {}
        self.weights = reward_weights(run.stage)
        self.tripwires = Tripwires(run.config.tripwires.wires, run.stage)
        self.state = LoopState()
        self.saved = 0  # the step of the newest checkpoint
        self.reasoning = self._stream(data.prompts, "reasoning prompts")
        self.general: PromptStream | None = None
        if preference := run.stage.preference:
            draw = partial(data.general_prompts, kinds=preference.general_kinds)
            self.general = self._stream(draw, "general prompts")

    def train(self) -> Path:
        """From the newest checkpoint (or the start) to the last step; the last checkpoint's folder."""
        if idle := self.tripwires.describe_inactive():
            self.run.warn(idle)
        self._resume()
        while self.state.step < self.config.max_steps:
            self.step()
        return self.run.folder.checkpoint(self.config.max_steps)

    def step(self) -> None:
        """P prompts of this rank, G completions each, and what is learned from them."""
        began = time.monotonic()
        metrics: Metrics = {}
        before = replace(self.state)
        heartbeat.at_step(before.step + 1)
        try:
            tokens, groups = self._draw(metrics)
        except Interrupted:
            self._restore_state(before)
            raise
        estimated = self._estimate(groups, tokens, metrics)
        with self._timed("reward", metrics):
            rows = rows_of_all(self.engine, groups, self.data.strategy_of)
            metrics |= summarise(rows)
        if why := too_many_failures(metrics, self.config.rewards.max_failed, rows):
            step = before.step + 1
            log_step(self.run, self.engine, self.tripwires, step, rows, metrics, began)
            self._restore_state(before)
            raise EnvironmentProblem(f"step {step}, from which nothing is learned: {why}")
        if self.config.ppo is None or self.state.step >= self.config.ppo.value_warmup_steps:
            with self._timed("update", metrics):
                rollouts = rollouts_of(groups, tokens) if estimated is None else estimated
                if count := self.config.routing_check_samples:
                    metrics |= routing_agreement(self.engine, rollouts, self.config, count)
                metrics |= update(self.engine, rollouts, self.config, self.reference)
            [learned] = self.engine.sum_over_ranks([sum(map(len, rollouts)) * self.config.inner_epochs])
            metrics["train/tokens_per_s"] = learned / metrics["time/update_s"]
        if self.critic and estimated is not None:
            with self._timed("value", metrics):
                metrics |= self.critic.learn(estimated)
        self._end_step(rows, metrics, began)

    def _estimate(
        self, groups: list[Group], tokens: list[list[int]], metrics: Metrics
    ) -> list[Rollout] | None:
        """PPO: the groups as rollouts whose tokens have advantages by the value model's estimates."""
        if self.critic is None:
            return None
        with self._timed("value", metrics):
            rollouts, found = self.critic.estimate(groups, tokens, self.reference)
        metrics |= found
        return rollouts

    def _draw(self, metrics: Metrics) -> tuple[list[list[int]], list[Group]]:
        """This rank's scored groups, and their prompts as token ids; `trained` says which to learn from.

        One rollout batch or, with dynamic sampling (DAPO, arXiv 2503.14476, section 3.2), as many as are
        needed for one of groups that teach; only the cursors last beyond the step.
        """
        tokens: list[list[int]] = []
        groups: list[Group] = []
        limit = self.config.max_sampling_batches
        for batch in range(limit):
            with Verdicts() as verdicts:
                with self._timed("sampling", metrics), stopping.leaving_early(self.engine):
                    prompts = self.next_prompts(metrics)
                    drawn, completions = self.rollout(prompts, verdicts, batch)
                with self._timed("reward", metrics):
                    scored = self.score(prompts, drawn, completions, verdicts)
            for number, group in enumerate(scored, len(groups)):
                group.place = self.engine.rank + number * self.engine.world_size
            tokens, groups = tokens + drawn, groups + scored
            if limit == 1:
                return tokens, groups
            metrics["rollout/batches"] = batch + 1.0
            taught = sum(has_signal(group, self.weights) for group in groups)
            if self.engine.sum_over_ranks([taught])[0] >= self.config.prompts_per_step:
                break
        with self._timed("reward", metrics):
            return redistribute_groups(
                self.engine, tokens, groups, self.weights, self.config.prompts_per_step
            )

    def rollout(
        self, prompts: list[Prompt], verdicts: Verdicts, batch: int = 0
    ) -> tuple[list[list[int]], list[Completion]]:
        """The prompts as token ids, and G completions of each in a row, drawn from the policy of now.

        Each is judged as it ends, while others are drawn. `batch` counts the rollout batches of the step.
        """
        sampling = self.config.sampling
        params = SamplingParams(
            sampling.max_tokens,
            sampling.temperature,
            sampling.top_p,
            self.config.group_size,
            self.run.seed(f"sampling/{batch}", self.state.step),
            first=self.engine.rank,
            stride=self.engine.world_size,
        )
        tokens = [self.chat.prompt_tokens(prompt) for prompt in prompts]
        chat, graphs = self.chat, self.run.config.engine.graphs
        with self.engine.gathered() as policy:
            sampler = Sampler(policy, chat.eos_id, chat.pad_id, sampling.max_num_seqs, graphs, stopping.asked)
            completions = sampler.generate(
                tokens, params, self._show_sampling, verdicts.on_completion(chat, prompts)
            )
        return tokens, completions

    def score(
        self,
        prompts: list[Prompt],
        tokens: list[list[int]],
        completions: list[Completion],
        verdicts: Verdicts,
    ) -> list[Group]:
        """Rewards and group-relative advantages; `tokens` are the prompts' token ids."""
        config = self.config
        added: dict[str, list[float]] = {}
        if self.reference and config.kl_in == "reward" and not self.critic:  # the critic takes it off tokens
            added["kl"] = kl_of_completions(self.reference, tokens, completions, config, self.engine.device)
        return score_groups(
            prompts,
            completions,
            self.weights,
            self.judges,
            config.rewards.truncation_penalty,
            config.normalise_std,
            ShapingInputs(config.rewards, config.sampling.max_tokens),
            added,
            verdicts,
        )

    def next_prompts(self, metrics: Metrics) -> list[Prompt]:
        """This rank's share of a batch's prompts; all ranks draw the same and move the cursors alike.

        A minibatch has the same ones on any ranks, as long as groups need not be cut for it.
        """
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
        prompts = mixed(reasoning, general, self.run.rng("order", state.step))
        return prompts[self.engine.rank :: self.engine.world_size]

    def _stream(self, draw: Callable[[str, int, int], list[Prompt]], what: str) -> PromptStream:
        config = self.config
        context = self.engine.module.config.max_position_embeddings
        return PromptStream(
            lambda n, seed: draw("train", n, seed),
            lambda pool: self.run.seed(what, pool),
            prompt_fits(self.chat, context, config.sampling.max_tokens),
            config.max_steps * config.prompts_per_step,
            what,
        )

    def _end_step(self, rows: list[Row], metrics: Metrics, began: float) -> None:
        """Replace the reference, evaluate, save and log, each when it is time."""
        config, state = self.config, self.state
        state.step += 1
        last = state.step == config.max_steps
        if self.reference and config.reference_every and state.step % config.reference_every == 0:
            self.reference.replace_by(self.engine)
            state.reference_step = state.step
        if config.eval.every and state.step % config.eval.every == 0 and not last:
            metrics |= self.quick_evaluation()
        trips = log_step(self.run, self.engine, self.tripwires, state.step, rows, metrics, began)
        shown = {name: metrics[key] for name, key in ON_SCREEN.items() if key in metrics}
        self.run.progress("train", state.step, config.max_steps, "steps", **shown)
        if stop := asking(trips, "stop"):
            raise Tripped(f"stopped in step {state.step}, which is not saved: {stop}")
        pause, leaving = asking(trips, "pause"), stopping.agreed(self.engine)
        if last or pause or leaving or (config.save_every and state.step % config.save_every == 0):
            self._save()
        if pause and not last:
            raise Tripped(f"paused after step {state.step}; the same command goes on from it: {pause}")
        if leaving and not last:
            raise Interrupted(leaving)

    def _restore_state(self, before: LoopState) -> None:
        """As if the step had never begun; what was learned before it is saved, and it comes again."""
        self.state = before
        if before.step > self.saved:
            self._save()

    def _save(self) -> None:
        self.saved = self.state.step
        self.run.save_checkpoint(self.engine, self.saved, asdict(self.state), self._export, self.beside)

    def _export(self, policy: DeepseekV3, folder: Path) -> None:
        save_pretrained(policy, folder)
        if self.reference and self.state.reference_step:
            self.reference.save(folder / ENGINE / "reference")

    def _resume(self) -> None:
        step, saved = self.run.resume(self.engine, self.beside)
        self.saved = step
        if step:
            self.state = LoopState(**saved)
            for metrics in self.run.logged():  # what has tripped already does not trip again
                self.tripwires.check(metrics)
            if self.reference and self.state.reference_step:
                self.reference.load(self.run.folder.checkpoint(step) / ENGINE / "reference")

    def _show_sampling(self, done: int, total: int) -> None:
        ranks = self.engine.world_size
        self.run.progress("sampling", done * ranks, total * ranks, "completions")

    @contextmanager
    def _timed(self, phase: str, metrics: Metrics) -> Iterator[None]:
        began = time.monotonic()
        with self.run.phase(phase):
            yield
        name = f"time/{phase}_s"
        metrics[name] = metrics.get(name, 0.0) + time.monotonic() - began
