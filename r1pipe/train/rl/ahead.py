"""The rollout batches of the steps, each drawn when its step begins, or `engine.async_steps` steps before.

With async_steps=k the batch of step s is asked for as soon as the weights are there that step s - k begins
with: what a step trains on is at most k steps old, for which `stage.importance_cap` corrects. The first k + 1
batches are drawn from the initial weights. A sampler in this process draws a batch at once: each token is
exactly min(s, k) steps old, and the same seed gives the same bits. A remote one draws while this process
trains; what it has not finished when new weights come goes on with them, and Completion.versions says which
tokens are whose.

A checkpoint holds the batches that wait for their step. Those that are not complete by then, with a remote
sampler, are drawn again by the run that resumes. Dynamic sampling's further batches of a step are drawn when
it asks for them, from the newest weights.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import pyarrow as pa

from r1pipe.config import ModelConfig, RLConfig
from r1pipe.core.errors import EnvironmentProblem, SamplerLost
from r1pipe.core.types import Completion, Group, Prompt
from r1pipe.rewards import Verdicts
from r1pipe.runs import stopping
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.rl import in_flight
from r1pipe.train.rl.prompts import Cursors, StepPrompts
from r1pipe.train.rl.routing import check_recorded, records
from r1pipe.train.rollout import SamplingParams
from r1pipe.train.run import Run

POLL_S = 0.1  # between looks at a batch that is drawn elsewhere
BEFORE_RESUME = -1


@dataclass
class LoopState:
    """What the loop remembers between steps; random streams are functions of the seed and the step."""

    step: int = 0  # finished steps
    reasoning_cursor: int = 0
    general_cursor: int = 0
    reference_step: int = 0  # the step whose policy is the reference; 0: the initial policy
    # of each batch that waits for its step: the step and its first cursors; filled in where it is saved
    waiting: list[list[int]] = field(default_factory=list)


@dataclass(eq=False)
class Batch:
    """This rank's share of one rollout batch."""

    step: int  # finished steps when it is trained on
    number: int  # among the rollout batches of the step
    asked: int  # finished steps when it was asked for; BEFORE_RESUME
    cursors: Cursors  # before its prompts
    too_long: int  # prompts passed over
    prompts: list[Prompt]
    tokens: list[list[int]]  # of the prompts
    verdicts: Verdicts = field(default_factory=Verdicts)
    completions: list[Completion] | None = None  # G for each prompt, once all are drawn
    drawing: Future[list[Completion]] | None = None  # by a remote sampler
    done: int = 0  # completions so far
    dropped: bool = False  # nobody waits for it

    def lost(self) -> EnvironmentProblem | None:
        """Why the sampler has failed to draw it; other errors are raised to whoever waits for it."""
        error = self.drawing.exception() if self.drawing is not None and self.drawing.done() else None
        return error if isinstance(error, EnvironmentProblem) else None

    def groups(self) -> list[Group]:
        assert self.completions is not None
        size = len(self.completions) // len(self.prompts)
        return [
            Group(prompt, self.completions[i * size : (i + 1) * size], prompt_tokens=self.tokens[i])
            for i, prompt in enumerate(self.prompts)
        ]


class RolloutQueue:
    """Draws rollout batches, and keeps those that wait for their step. All ranks call all methods."""

    def __init__(self, run: Run[RLConfig], engine: Engine):
        self.run, self.config, self.engine = run, run.stage, engine
        self.prompts = StepPrompts(run)
        self.ahead = run.config.engine.async_steps
        self.waiting: dict[int, Batch] = {}  # by step
        self._threads = ThreadPoolExecutor(self.ahead + 1, "sampling")

    def take(self, state: LoopState, number: int = 0) -> Batch:
        """Rollout batch `number` of the next step, drawn; batch 0 has those of later steps drawn, too.

        Advances the cursors. Raises Interrupted or SamplerLost in all ranks; `abandon` then takes all back.
        """
        if number:
            batch = self._next(state, state.step, number)
            self._draw(batch)
            return self._drawn(batch)
        with self._together(again=False):
            self.run.sampler.update(self.engine, state.step)
        last = max(state.step, min(state.step + self.ahead, self.config.max_steps - 1))
        for step in range(state.step, last + 1):
            if step not in self.waiting:
                self.waiting[step] = self._next(state, step)
            batch = self.waiting[step]
            if lost := batch.lost():
                self.run.warn(f"the completions of step {step + 1} are drawn again: {lost}")
            if batch.completions is None and (batch.drawing is None or lost):
                self._draw(batch)
        return self._drawn(self.waiting[state.step])

    def finished(self, step: int) -> None:
        """Forget what was trained on: the batches of finished steps."""
        for number in [number for number in self.waiting if number < step]:
            self.waiting.pop(number).verdicts.close()

    def abandon(self, state: LoopState) -> None:
        """Return to the beginning of a step, whose state this is: it will ask again for what it asked for."""
        for step, batch in [*self.waiting.items()]:
            batch.verdicts.close()
            batch.verdicts = Verdicts()
            if batch.asked == state.step:
                self.waiting.pop(step).dropped = True

    def close(self) -> None:
        """Wait for nothing that is under way."""
        for batch in self.waiting.values():
            batch.dropped = True
            batch.verdicts.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    # --- what a checkpoint keeps

    def saved(self) -> tuple[list[list[int]], pa.Table]:
        """LoopState.waiting, and the completions of the batches in it that are complete, of all ranks."""
        rows: list[in_flight.Row] = []
        for batch in self.waiting.values():
            if batch.drawing is not None and batch.drawing.done() and not batch.drawing.exception():
                batch.completions, batch.drawing = batch.drawing.result(), None
            if batch.completions is not None:
                placed = zip(self._places(), batch.completions, strict=True)
                rows += [in_flight.row_of(batch.step, place, completion) for place, completion in placed]
        tables = self.engine.all_gather_objects(in_flight.table_of(rows))
        return [[batch.step, *batch.cursors] for batch in self.waiting.values()], pa.concat_tables(tables)

    def resume(self, state: LoopState, engine_folder: Path) -> None:
        """Take up the batches that a checkpoint kept; those that were not complete will be drawn again."""
        kept = in_flight.read(engine_folder)
        for step, *cursors in state.waiting:
            batch, _ = self._batch(step, 0, BEFORE_RESUME, (cursors[0], cursors[1]))
            self.waiting[step] = batch
            if all((step, place) in kept for place in self._places()):
                batch.completions = [kept[step, place] for place in self._places()]
                check = batch.verdicts.on_completion(self.run.chat, batch.prompts)
                for number, completion in enumerate(batch.completions):
                    check(number // self.config.group_size, completion)
        state.waiting = []
        incomplete = sum(batch.completions is None for batch in self.waiting.values())
        if incomplete := self.engine.agree_max(incomplete):
            self.run.warn(
                f"{incomplete} rollout batches were not complete when the run was saved; they are drawn "
                "again, from the newest weights"
            )

    def _places(self) -> list[int]:
        """The numbers of this rank's completions among those of a batch on all ranks."""
        size, prompts = self.config.group_size, self.config.prompts_per_step
        mine = range(self.engine.rank, prompts, self.engine.world_size)
        return [prompt * size + sample for prompt in mine for sample in range(size)]

    # --- drawing

    def _next(self, state: LoopState, step: int, number: int = 0) -> Batch:
        """The batch that the cursors are at, which they leave behind."""
        cursors = state.reasoning_cursor, state.general_cursor
        batch, cursors = self._batch(step, number, state.step, cursors)
        state.reasoning_cursor, state.general_cursor = cursors
        return batch

    def _batch(self, step: int, number: int, asked: int, cursors: Cursors) -> tuple[Batch, Cursors]:
        prompts, after = self.prompts.take(step, cursors)
        too_long = sum(after) - sum(cursors) - len(prompts)
        mine = prompts[self.engine.rank :: self.engine.world_size]
        tokens = [self.run.chat.prompt_tokens(prompt) for prompt in mine]
        return Batch(step, number, asked, cursors, too_long, mine, tokens), after

    def _draw(self, batch: Batch) -> None:
        """Draw a batch: at once or, by a remote sampler for a later step, while this process goes on."""
        if self.ahead and self.run.sampler.remote:
            batch.drawing = self._threads.submit(self._generate, batch)
            return
        with self._together(again=False):  # a server has been waited for in vain
            batch.completions = self._generate(batch)

    def _drawn(self, batch: Batch) -> Batch:
        """The batch, once it is drawn."""
        if batch.completions is None:
            try:
                with self._together(again=True):
                    batch.completions = self._result(batch)
            finally:
                batch.drawing = None  # a failure is reported once
        return batch

    def _result(self, batch: Batch) -> list[Completion]:
        assert batch.drawing is not None
        while not wait([batch.drawing], POLL_S).done:
            self._show(batch)
            if stopping.requested():
                raise stopping.Stopped
        return batch.drawing.result()

    def _generate(self, batch: Batch) -> list[Completion]:
        sampling, chat = self.config.sampling, self.run.chat
        params = SamplingParams(
            *(sampling.max_tokens, sampling.temperature, sampling.top_p, self.config.group_size),
            seed=self.run.seed(f"sampling/{batch.number}", batch.step),
            first=self.engine.rank,
            stride=self.engine.world_size,
            max_num_seqs=sampling.max_num_seqs,
            record_experts=records(self.config),
        )

        def progress(done: int, total: int) -> None:
            batch.done = done
            if batch.drawing is None:
                self._show(batch)

        def stop() -> bool:
            return batch.dropped or bool(stopping.requested())

        ended = batch.verdicts.on_completion(chat, batch.prompts)
        completions = self.run.sampler.generate(batch.tokens, params, progress, ended, stop=stop)
        if self.config.replay_routing and isinstance(self.run.config.model, ModelConfig):
            check_recorded(completions, self.run.config.model)
        return completions

    def _show(self, batch: Batch) -> None:
        ranks, total = self.engine.world_size, len(batch.prompts) * self.config.group_size
        self.run.progress("sampling", batch.done * ranks, total * ranks, "completions")

    @contextmanager
    def _together(self, again: bool) -> Iterator[None]:
        """A block that all ranks leave alike: finished, with Interrupted or with SamplerLost."""
        problem = None
        with stopping.leaving_early(self.engine):
            try:
                yield
            except EnvironmentProblem as error:
                problem = str(error)
        if problems := [text for text in self.engine.all_gather_objects(problem) if text is not None]:
            raise SamplerLost(problems[0], again)


def staleness(ranks: Ranks, groups: Sequence[Group], step: int) -> dict[str, float]:
    """How many steps before `step` the weights were made that drew what is trained on: over the tokens whose
    version is known, of all ranks."""
    completions = chain.from_iterable(group.completions for group in groups if group.trained)
    spans = [span for completion in completions for span in completion.versions]
    oldest = ranks.agree_max(max((step - version for _, version in spans), default=0))
    tokens, steps = ranks.sum_over_ranks(
        [float(sum(n for n, _ in spans)), float(sum(n * (step - version) for n, version in spans))]
    )
    return (
        {"rollout/staleness/mean": steps / tokens, "rollout/staleness/max": float(oldest)} if tokens else {}
    )
