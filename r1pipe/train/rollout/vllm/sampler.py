"""The Sampler that is a vLLM server: weights are sent to it, completions asked of it, both checked.

Each update gives the served weights a label: this job's name and the version. vLLM returns it with every
token, so a completion from other weights than asked for (a server that was restarted, another job's update)
is told, and drawn again after the right weights are back.

All ranks call `update` and `generate` together: rank 0 updates the weights, each rank draws its own prompts.
What fails on one rank is told to all at the end of either, and all go the same way.
"""

import secrets
import threading
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from r1pipe.config.sampler import SamplerConfig
from r1pipe.core.errors import R1pipeError, SamplerLost
from r1pipe.core.types import Completion
from r1pipe.runs.stopping import Stopped
from r1pipe.train.rollout.drawing import SamplingParams
from r1pipe.train.rollout.sampler import Ended, Progress, Ranks, Stop, Weights, never
from r1pipe.train.rollout.vllm.client import Client, Gone
from r1pipe.train.rollout.vllm.requests import Draw, Wanted, read, wanted
from r1pipe.train.rollout.vllm.server import Server
from r1pipe.train.rollout.vllm.serving import Policy, Problem, Serving, Show, Trouble, attempt


class VLLMSampler:
    """See the file's text."""

    remote: ClassVar[bool] = True

    def __init__(
        self,
        config: SamplerConfig,
        ranks: Ranks,
        policy: Policy,
        server: Server | None,
        show: Show = lambda passed, limit: None,
        keep: bool = False,
    ):
        """`server`: rank 0's, where none is named; it starts with the first update. `show` gets the seconds
        of a start and their limit. `keep`: completions under way go on after an update (asynchronous
        rollouts). Raises Refused where the server of sampler.url is not the trainer's model, and SamplerLost
        where there is none.
        """
        self.config, self.ranks, self.policy, self.show = config, ranks, policy, show
        sleeps = bool(server and server.colocated and not keep)
        mine = secrets.token_hex(8), server.url if server else config.url, sleeps
        self.name, self.url, self._sleeps = ranks.all_gather_objects(mine)[0]
        self.serving = Serving(config, ranks, policy, self.url, server, keep)
        self.version, self._weights = -1, None  # type: tuple[int, Weights | None]
        if config.url is not None:
            problem = self._agreed(attempt(self.serving.check) if ranks.rank == 0 else None)
            if problem is not None:
                raise SamplerLost(f"{problem}; start the server of sampler.url, then run the same command")

    def update(self, weights: Weights, version: int) -> None:
        """Send the weights, unless this version is served already. Raises SamplerLost in all ranks where the
        server stays away for sampler.wait_s seconds, and Refused."""
        self.version, self._weights = version, weights
        self._recover(None, Trouble())

    def generate(
        self,
        prompts: Sequence[list[int]],
        params: SamplingParams,
        progress: Progress | None = None,
        ended: Ended | None = None,
        limits: Sequence[int] | None = None,
        stop: Stop = never,
    ) -> list[Completion]:
        """As Sampler's. Every token comes from the weights of now, or of an update that comes meanwhile: its
        `versions` say which. Log-probabilities are NaN where top_p < 1: vLLM's are then not the policy's.

        Raises SamplerLost as `update`; in a thread beside the main one, which agrees with no other rank,
        as soon as the server fails.
        """
        shape = self.policy.longest, self.policy.vocab_size
        todo = wanted(prompts, params, limits, self.policy.eos_ids, shape)
        drawn: list[Completion | None] = [None] * len(todo)
        version_of = self._version_of(self.version)

        def draw() -> None:
            self._draw(todo, drawn, params.max_num_seqs, version_of, progress, ended, stop)

        if threading.current_thread() is threading.main_thread():
            self._draw_together(draw, lambda: drawn.count(None))
        else:
            try:
                draw()
            except Gone as error:
                raise SamplerLost(str(error)) from None
        return [completion for completion in drawn if completion is not None]

    def forget(self) -> None:
        self._weights = None

    def close(self) -> None:
        """End the server that this job started."""
        if self.serving.server:
            self.serving.server.close()

    # --- drawing

    def _draw_together(self, draw: Callable[[], None], missing: Callable[[], int]) -> None:
        """`draw` on all ranks until no rank misses a completion."""
        trouble = Trouble()
        while True:
            if self._sleeps:  # all wait for rank 0 to wake it
                self._agreed(attempt(self.serving.wake))
            before = missing()
            problem = attempt(draw)
            if missing() < before:
                trouble = Trouble()
            problem = self._agreed(problem)
            if problem is None:
                break
            self._recover(problem, trouble)
        if self._sleeps:
            self._agreed(attempt(self.serving.sleep) if self.ranks.rank == 0 else None)

    def _draw(
        self,
        todo: Sequence[Wanted],
        drawn: list[Completion | None],
        connections: int,
        version_of: Callable[[str], int],
        progress: Progress | None,
        ended: Ended | None,
        stop: Stop,
    ) -> None:
        """Fill what is missing of `drawn`. What came with the right weights stays, whatever happens next."""

        def take(number: int, choice: Any) -> None:
            completion = read(choice, todo[number], version_of, self.policy.dense_layers)
            drawn[number] = completion
            if ended:
                ended(todo[number].prompt, completion)
            if progress:
                progress(len(drawn) - drawn.count(None), len(drawn))

        missing = [(number, want) for number, want in enumerate(todo) if drawn[number] is None]
        client = Client(self.url, self.config.timeout_s)  # its own: a draw that ends hangs up
        Draw(client, self.config.timeout_s, connections).run(missing, take, stop)

    def _version_of(self, oldest: int) -> Callable[[str], int]:
        """Reads a label of weights; raises Gone for one that must not be drawn from."""

        def version_of(label: str) -> int:
            name, _, number = str(label).rpartition(":")
            if name != self.name:
                raise Gone(
                    f"{self.url} serves weights {label!r}, not this job's: it was restarted, or "
                    "another job updates it"
                )
            if not oldest <= int(number) <= self.version:
                raise Gone(f"{self.url} drew from version {number}, not {oldest} to {self.version}")
            return int(number)

        return version_of

    # --- what all ranks do together

    def _recover(self, problem: Problem, trouble: Trouble) -> None:
        """Send the weights until they are served; after a `problem` wait for the server first."""
        first, label = self.ranks.rank == 0, f"{self.name}:{self.version}"
        assert self._weights is not None, "update first"
        while True:
            if problem is not None:
                self._agreed(self.serving.wait(problem, trouble, self.show) if first else None)
            problem = self._agreed(self.serving.push(self._weights, label, self.show))
            if problem is None:
                return

    def _agreed(self, problem: Problem) -> Problem:
        """The problem that all ranks act on: None, or Gone. Raises others in all of them, Stopped first:
        ranks that are asked to stop leave together."""
        problems = [found for found in self.ranks.all_gather_objects(problem) if found is not None]
        for kind in (Stopped, R1pipeError):
            for found in problems:
                if isinstance(found, kind):
                    raise found
        return problems[0] if problems else None
