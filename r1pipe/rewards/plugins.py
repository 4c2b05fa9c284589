"""The user's functions as rewards, in worker processes (plugin_worker.py) that can be killed.

They are the user's code, so they are not jailed, but they never run in the training process. A process keeps
what the files loaded, call after call, until a call breaks a limit; then it is replaced.
"""

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import decode_source
from queue import LifoQueue
from typing import Any

from r1pipe.config import PluginLimits
from r1pipe.config.custom_rewards import CustomReward
from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.launchers import without_place
from r1pipe.core.types import Completion, Prompt, Score, Status
from r1pipe.rewards import plugin_worker
from r1pipe.rewards.programs.jailed import encode
from r1pipe.rewards.reply import Patience, score_of
from r1pipe.rewards.worker_process import ChildAsleep, ChildEnded, NoReply, WorkerProcess


class PluginPool:
    """The processes of one rank, each of which knows every function; started when they are needed."""

    def __init__(self, rewards: Sequence[CustomReward], limits: PluginLimits):
        self.rewards, self.limits = rewards, limits
        self._idle: LifoQueue[PluginWorker] = LifoQueue()  # a warm one comes before a cold one
        for _ in range(limits.workers):
            self._idle.put(PluginWorker(rewards, limits))
        self._groups: list[str] | None = None

    def groups(self) -> list[str]:
        """The functions that take a whole group. Raises EnvironmentProblem where files cannot be loaded."""
        if self._groups is None:
            worker = self._idle.get()
            try:
                self._groups = worker.start()
            except (NoReply, OSError) as error:
                places = ", ".join(sorted({reward.location for reward in self.rewards}))
                raise EnvironmentProblem(f"the rewards of {places} cannot be loaded: {error}") from None
            finally:
                self._idle.put(worker)
        return self._groups

    def ask(
        self, name: str, prompt: Prompt, completions: Sequence[Completion], patience: Patience
    ) -> list[Score | None]:
        """The score of each completion; None where the reward has no rule for the prompt. Thread-safe."""
        whole = name in self.groups()
        worker = self._idle.get()
        try:
            return worker.ask(name, prompt, completions, whole, patience)
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        for _ in range(self.limits.workers):
            self._idle.get().close()


class PluginWorker:
    """One process, started for the first call and again after it was lost."""

    def __init__(self, rewards: Sequence[CustomReward], limits: PluginLimits):
        self.rewards, self.limits = rewards, limits
        self.child: WorkerProcess | None = None

    def start(self) -> list[str]:
        """Load the functions; the names of those that take a group. Raises NoReply or OSError."""
        self.close()
        variables = without_place(os.environ)
        variables |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # there are several processes
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        command = [sys.executable, "-P", plugin_worker.__file__]
        limits = self.limits
        self.child = child = WorkerProcess(
            command,
            variables,
            sleep_limit_s=limits.sleep_s,
            more_s=limits.sleep_s + limits.cpu_s,
            stderr=None,
            own_group=True,
        )
        rewards = [asdict(reward) | {"source": decode_source(reward.source)} for reward in self.rewards]
        try:
            reply = child.ask({"memory": int(limits.memory_gb * 1e9), "rewards": rewards}, may_sleep=True)
            if "error" in reply:
                raise NoReply(reply["error"])
        except NoReply as error:
            self.close()
            raise NoReply(self._reason(error)) from None
        return reply["groups"]

    def ask(
        self, name: str, prompt: Prompt, completions: Sequence[Completion], whole: bool, patience: Patience
    ) -> list[Score | None]:
        """The score of each completion. A call that costs the process has none, and the next one goes on;
        `whole`: one call is about all completions."""
        scores: list[Score | None] = []
        while len(scores) < len(completions):
            rest = completions[len(scores) :]
            if gone := patience.over:
                return scores + [gone] * len(rest)
            try:
                if self.child is None or self.child.has_ended():
                    self.start()
                assert self.child is not None
                for reply in self.child.ask_for_each(self._request(name, prompt, rest), len(rest)):
                    scores.append(score_of(reply))
            except NoReply as error:
                self.close()
                verdict = Score(0.0, Status.VERIFIER_FAILED, self._reason(error))
                scores += patience.lose(len(rest) if whole else 1, verdict)
            except OSError as error:  # no process can be started
                self.close()
                verdict = Score(0.0, Status.INFRASTRUCTURE_FAILED, str(error))
                scores += patience.lose(len(rest), verdict)
        return scores

    def _request(self, name: str, prompt: Prompt, completions: Sequence[Completion]) -> dict[str, Any]:
        sent = [{"tokens": c.tokens, "finish_reason": c.finish_reason, "text": c.text} for c in completions]
        return {
            "name": name,
            "prompt": encode(asdict(prompt)),
            "completions": sent,
            "cpu_s": self.limits.cpu_s,
        }

    def _reason(self, error: NoReply) -> str:
        key = "stage.rewards.plugin_limits"
        if isinstance(error, ChildEnded) and error.code == -signal.SIGPROF:
            return f"more than {key}.cpu_s={self.limits.cpu_s:g} of processor time"
        if isinstance(error, ChildEnded) and error.code == plugin_worker.OUT_OF_MEMORY:
            return f"more memory than {key}.memory_gb={self.limits.memory_gb:g}"
        if isinstance(error, ChildAsleep):
            return f"asleep for {key}.sleep_s={self.limits.sleep_s:g}"
        return str(error)

    def close(self) -> None:
        """End the process, and what it has started."""
        if self.child:
            self.child.close()
            self.child = None
