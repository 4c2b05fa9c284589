"""A child process that answers JSON lines with JSON lines, with every wait bounded.

No verdict may depend on the machine's load, so a request is limited by the child's own processor time:
either whoever starts the child sets that limit in it, or the parent reads the child's clock (`limit_cpu`),
which nothing inside can stop. The parent handles two other cases:

- A sleeping child uses no processor time. Its state is polled every second or sooner; where polls find it
  asleep for as long as its limit, ChildAsleep is raised. Load cannot cause this: a process waiting for a
  processor is runnable, not asleep.
- A child without a reply after WALL_LIMIT_S did not get its share of the machine: MachineBusy.
"""

import json
import math
import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import psutil

SLEEP_LIMIT_S = 5
WALL_LIMIT_S = 300.0  # a backstop; the limit of processor time ends work long before
POLL_EVERY_S = 1.0
SHORTEST_POLL_S = 0.05
REPLY_LIMIT = 1 << 20  # bytes, where no other limit is given
_AWAKE = (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)


class NoReply(Exception):
    """The child gave no usable reply."""


class ChildEnded(NoReply):
    def __init__(self, code: int | None):
        super().__init__(
            "the process closed its pipes" if code is None else f"the process ended, code {code}"
        )
        self.code = code


class ChildAsleep(NoReply):
    pass


class MachineBusy(NoReply):
    pass


class OutOfTime(NoReply):
    pass


class WorkerProcess:
    """One child process. Every method but `close` may raise NoReply; the child cannot be used after that.

    `sleep_limit_s`: what a message may sleep; None: SLEEP_LIMIT_S. `more_s`: added to WALL_LIMIT_S.
    `reply_limit`: bytes of a reply. `stderr`: as of Popen; None is this process's. `own_group`: `close` ends
    all that the child has started.
    """

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        pass_fds: Sequence[int] = (),
        *,
        sleep_limit_s: float | None = None,
        more_s: float = 0.0,
        stderr: int | None = subprocess.DEVNULL,
        own_group: bool = False,
        reply_limit: int = REPLY_LIMIT,
    ):
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=env,
            pass_fds=pass_fds,
            bufsize=0,
            process_group=0 if own_group else None,
        )
        self._own_group = own_group
        assert self.process.stdin and self.process.stdout
        self._stdin, self._stdout = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self._stdin, False)
        self._reply_limit = reply_limit
        self._buffer = bytearray()
        self._sleep_limit_s = SLEEP_LIMIT_S if sleep_limit_s is None else sleep_limit_s
        self._more_s = more_s
        self._asleep_s = 0.0
        self._deadline = self._next_poll = self._poll_s = 0.0
        self._family: list[psutil.Process] = []  # whose processor time is limited
        self._cpu_end = math.inf

    def ask(self, message: Mapping[str, Any], may_sleep: bool = False) -> dict[str, Any]:
        """The reply to one message, with a fresh allowance of sleep (unlimited with `may_sleep`).

        `send` and `receive` alone share what remains of the allowance.
        """
        self._asleep_s = -math.inf if may_sleep else 0.0
        self.send(message)
        reply = self.receive()
        self._asleep_s = 0.0
        return reply

    def ask_for_each(self, message: Mapping[str, Any], count: int) -> Iterator[dict[str, Any]]:
        """The `count` replies to one message, each with a fresh allowance of sleep and time."""
        self.send(message)
        for _ in range(count):
            self._asleep_s, self._deadline = 0.0, time.monotonic() + WALL_LIMIT_S + self._more_s
            yield self.receive()

    def send(self, message: Mapping[str, Any]) -> None:
        now = time.monotonic()
        self._deadline = now + WALL_LIMIT_S + self._more_s
        self._poll_next(now)
        data = json.dumps(message).encode() + b"\n"
        while data:
            self._wait([], [self._stdin])
            try:
                data = data[os.write(self._stdin, data) :]
            except BrokenPipeError:
                raise self._ended() from None

    def receive(self) -> dict[str, Any]:
        end = self._buffer.find(b"\n")
        while end < 0:
            self._wait([self._stdout], [])
            more = os.read(self._stdout, 1 << 20)
            if not more:
                raise self._ended()
            end = more.find(b"\n")
            end = end if end < 0 else end + len(self._buffer)
            self._buffer += more
            if len(self._buffer) > self._reply_limit:
                raise NoReply("the reply is too long")
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self.check_cpu()
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise NoReply(f"the reply is not JSON: {error}") from None
        if not isinstance(reply, dict):
            raise NoReply("the reply is not a JSON object")
        return reply

    def limit_cpu(self, seconds: float) -> None:
        """From now on the child and its present children may use this much processor time: a reply that takes
        more raises OutOfTime. The clock counts hundredths of a second."""
        if not self._family:
            child = psutil.Process(self.process.pid)
            self._family = [child, *child.children(recursive=True)]
        self._cpu_end = self._cpu_s() + seconds

    def check_cpu(self) -> None:
        """Raises OutOfTime where the child has used more processor time than it may."""
        if self._family and self._cpu_s() > self._cpu_end:
            raise OutOfTime("the limit of processor time")

    def _cpu_s(self) -> float:
        try:
            return sum(sum(each.cpu_times()[:2]) for each in self._family)
        except psutil.Error:
            return 0.0  # it has ended, which its pipe will show

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def close(self) -> None:
        self.process.kill()
        if self._own_group:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        with self.process:  # closes the pipes and waits
            pass

    def _wait(self, readers: list[int], writers: list[int]) -> None:
        """Waits until a pipe is ready; polls the child even if it sends a byte now and then."""
        while True:
            timeout = max(0.0, self._next_poll - time.monotonic())
            ready = any(select.select(readers, writers, [], timeout))
            now = time.monotonic()
            if now >= self._next_poll:
                self.check_cpu()
                self._asleep_s += self._poll_s * self._sleeps()
                self._poll_next(now)
                if self._asleep_s >= self._sleep_limit_s:
                    raise ChildAsleep(f"the process slept for {self._sleep_limit_s:g} s")
            if now >= self._deadline:
                raise MachineBusy(
                    f"no reply within {WALL_LIMIT_S + self._more_s:g} s: the machine is too busy"
                )
            if ready:
                return

    def _poll_next(self, now: float) -> None:
        """A second later, or when the child can have used its processor time, if that is sooner."""
        left = self._cpu_end - self._cpu_s() if self._family else math.inf
        self._poll_s = min(POLL_EVERY_S, max(left, SHORTEST_POLL_S))
        self._next_poll = now + self._poll_s

    def _sleeps(self) -> bool:
        """Whether neither the child nor a process that it started is running or waiting for its turn."""
        try:
            child = psutil.Process(self.process.pid)
            return not any(each.status() in _AWAKE for each in (child, *child.children(recursive=True)))
        except psutil.Error:
            return False  # it is ending, which its pipe will show

    def _ended(self) -> ChildEnded:
        try:
            return ChildEnded(self.process.wait(SLEEP_LIMIT_S))
        except subprocess.TimeoutExpired:
            return ChildEnded(None)
