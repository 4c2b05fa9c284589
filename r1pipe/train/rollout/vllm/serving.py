"""Rank 0's side of a vLLM server: that it serves the right model, the right weights, and comes back.

What goes wrong is returned, not raised, so that rank 0 can tell the other ranks (`attempt`).
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from r1pipe.config.sampler import SamplerConfig
from r1pipe.core.errors import R1pipeError, SamplerLost
from r1pipe.runs import heartbeat, stopping
from r1pipe.train.rollout.sampler import Ranks, Weights
from r1pipe.train.rollout.vllm.client import Client, Gone, Refused
from r1pipe.train.rollout.vllm.server import Server
from r1pipe.train.rollout.vllm.transfer import Transfer
from r1pipe.train.rollout.vllm.worker import r1pipe_wire as wire

AGAIN_S = 1.0  # between looks at a server that is gone, times the number of failures, up to
LONGEST_PAUSE = 10
MB = 1 << 20

log = logging.getLogger("r1pipe")
Problem = Exception | None
Show = Callable[[int, int], None]


@dataclass(frozen=True)
class Policy:
    """What a server must serve to draw for the trainer."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    longest: int  # tokens of a prompt with its completion
    vocabulary: str  # hash of the tokenizer's words (r1pipe_wire.vocabulary_hash)
    eos_ids: tuple[int, ...]
    dense_layers: int = 0  # the first layers, which have no experts


@dataclass
class Trouble:
    """How long a server has failed, and how often, since it last drew anything."""

    began: float = field(default_factory=time.monotonic)
    times: int = 0


def attempt(work: Callable[[], object]) -> Problem:
    """What goes wrong in `work`; None where nothing does."""
    try:
        work()
    except (Gone, R1pipeError, stopping.Stopped) as error:
        return error
    return None


def lost(problem: Exception) -> SamplerLost:
    return SamplerLost(
        f"the sampler is lost: {problem}; start the server again, then run the same command: it takes the "
        "step again"
    )


class Serving:
    """One server, with the weights that it serves. All ranks have one; all but `push` is rank 0's."""

    def __init__(
        self, config: SamplerConfig, ranks: Ranks, policy: Policy, url: str, server: Server | None, keep: bool
    ):
        """`server`: one that this process started or will start. `keep`: as Transfer.begin's."""
        self.config, self.ranks, self.policy, self.url = config, ranks, policy, url
        self.server, self.keep = server, keep
        self.client = Client(url, config.timeout_s)
        self.transfer = Transfer(self.client, ranks.device, config.timeout_s)
        self.served: str | None = None  # the label of the weights that are known to be served
        self._asleep = False

    def push(self, weights: Weights, label: str, show: Show) -> Problem:
        """Send the weights once, unless they are served already; the problem is known to rank 0 alone.

        All ranks call: they read all buckets, whatever happens to rank 0.
        """
        first = self.ranks.rank == 0
        problem = attempt(lambda: self._begin(label, show)) if first else None
        if self.ranks.all_gather_objects(first and problem is None and self.served == label)[0]:
            return None
        for bucket in weights.buckets(self.config.bucket_mb * MB):
            if first and problem is None:
                problem = attempt(lambda tensors=bucket: self.transfer.send(tensors))  # type: ignore[misc]
            heartbeat.tick()
        return problem or (attempt(lambda: self._finish(label)) if first else None)

    def _begin(self, label: str, show: Show) -> None:
        """Open an update, unless the version is served already."""
        if self.server and not self.server.alive():
            self._start(show)
        self.wake()
        self.served = self.client.version()
        if self.served == label:
            self.client.post("/resume")  # the connection may have been lost after the update, before this
        else:
            self.served = None
            self.check()
            self.transfer.begin(self.keep)

    def _finish(self, label: str) -> None:
        self.transfer.finish(label, self.keep)
        self.served = label

    def _start(self, show: Show) -> None:
        assert self.server
        self.transfer.disconnect()
        self._asleep = False
        self.server.start(show)

    def wait(self, problem: Exception, trouble: Trouble, show: Show) -> Problem:
        """Until the server answers, or sampler.wait_s has passed in vain: then SamplerLost."""
        wait_s = self.config.wait_s
        trouble.times += 1
        self.served = None
        self.transfer.disconnect()
        log.warning("%s; waits for it up to sampler.wait_s=%g s, then draws again", problem, wait_s)

        def over() -> bool:
            return bool(time.monotonic() - trouble.began > wait_s or stopping.requested())

        if self.server and (trouble.times > 1 or not self.server.alive() or attempt(self.client.version)):
            return lost(problem) if over() else attempt(lambda: self._start(show))
        while True:
            for _ in range(min(trouble.times, LONGEST_PAUSE)):
                heartbeat.tick()
                time.sleep(AGAIN_S)
            found = attempt(self.check)
            if over():
                return lost(found or problem)
            if not isinstance(found, Gone):
                return found

    def check(self) -> None:
        """Raises Refused where the server is not the trainer's model with the trainer's tokenizer."""
        policy = self.policy
        expected: dict[str, Any] = {"protocol": wire.PROTOCOL, "logprobs_mode": "processed_logprobs"}
        expected |= {key: getattr(policy, key) for key in ("vocab_size", "hidden_size", "num_hidden_layers")}
        if self.config.url is not None:  # ours has no tokenizer: tokens are all that it sees
            expected["vocabulary"] = policy.vocabulary
        for facts in self.client.workers_say("r1pipe_facts"):
            for key, value in expected.items():
                if facts.get(key) != value:
                    raise Refused(_differs(self.url, key, facts.get(key), value))
            if facts.get("max_model_len", 0) < policy.longest:
                raise Refused(
                    f"the server at {self.url} takes {facts.get('max_model_len')} tokens, the trainer's "
                    f"model {policy.longest}; start it with --max-model-len {policy.longest}"
                )
            both_gpus = facts.get("device") == self.ranks.device.type == "cuda"
            self.transfer.over_gpus = both_gpus and not (self.server and self.server.colocated)

    # --- one GPU for both

    def wake(self) -> None:
        if self._asleep:
            self._asleep = False
            self.client.post("/wake_up")

    def sleep(self) -> None:
        """Give the trainer the memory of its GPUs; the weights wait in the machine's."""
        self.client.post("/sleep", level="1")
        self._asleep = True


def _differs(url: str, key: str, theirs: Any, ours: Any) -> str:
    if key == "vocabulary":
        return f"the server at {url} has another tokenizer than the trainer; start it with the trainer's"
    if key == "logprobs_mode":
        return f"the server at {url} has --logprobs-mode {theirs}; start it with --logprobs-mode {ours}"
    return f"the server at {url} has another model: its {key} is {theirs}, the trainer's is {ours}"
