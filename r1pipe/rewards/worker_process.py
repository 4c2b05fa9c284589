"""A child process that answers JSON lines with JSON lines, and is never waited for without end.

No verdict may depend on how busy the machine is, so the work that a request takes is limited by the child's
own processor time; whoever starts the child sets that limit in it. The parent ends two other cases only:

- A child that sleeps uses no processor time however long one waits. Once a second of waiting its state is
  looked at; after SLEEP_LIMIT_S such looks at a sleeping child, ChildAsleep is raised. A busy machine cannot
  cause this: a process that waits for its turn on a processor is runnable, not asleep.
- A child that has not replied after WALL_LIMIT_S did not get its share of the machine, which says nothing
  about its work: MachineBusy.
"""

import json
import math
import os
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil

SLEEP_LIMIT_S = 5
WALL_LIMIT_S = 300.0  # a backstop; work ends by its limit of processor time long before
LOOK_EVERY_S = 1.0
REPLY_LIMIT = 1 << 20  # bytes
_AWAKE = (psutil.STATUS_RUNNING, psutil.STATUS_DISK_SLEEP)


class NoReply(Exception):
    """The child gave no reply that can be used."""


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


class WorkerProcess:
    """One child process. Every method but `close` raises NoReply; the child is of no use after that."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], pass_fds: Sequence[int] = ()):
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=env,
            pass_fds=pass_fds,
            bufsize=0,
        )
        assert self.process.stdin and self.process.stdout
        self._stdin, self._stdout = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self._stdin, False)
        self._buffer = b""
        self._asleep_s = 0.0
        self._deadline = self._next_look = 0.0

    def ask(self, message: Mapping[str, Any], may_sleep: bool = False) -> dict[str, Any]:
        """The reply to one message, with a fresh allowance of sleep, or no limit to it.

        What is sent and received without `ask` shares the allowance that is left.
        """
        self._asleep_s = -math.inf if may_sleep else 0.0
        self.send(message)
        reply = self.receive()
        self._asleep_s = 0.0
        return reply

    def send(self, message: Mapping[str, Any]) -> None:
        now = time.monotonic()
        self._deadline, self._next_look = now + WALL_LIMIT_S, now + LOOK_EVERY_S
        data = json.dumps(message).encode() + b"\n"
        while data:
            self._wait([], [self._stdin])
            try:
                data = data[os.write(self._stdin, data) :]
            except BrokenPipeError:
                raise self._ended() from None

    def receive(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            self._wait([self._stdout], [])
            more = os.read(self._stdout, 1 << 16)
            if not more:
                raise self._ended()
            self._buffer += more
            if len(self._buffer) > REPLY_LIMIT:
                raise NoReply("a reply beyond the limit")
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise NoReply(f"the reply is not JSON: {error}") from None
        if not isinstance(reply, dict):
            raise NoReply("the reply is not a JSON object")
        return reply

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def close(self) -> None:
        self.process.kill()
        with self.process:  # closes the pipes and waits
            pass

    def _wait(self, readers: list[int], writers: list[int]) -> None:
        """Until a pipe is ready. A child that sends a byte now and then is looked at all the same."""
        while True:
            left = max(0.0, self._next_look - time.monotonic())
            ready = any(select.select(readers, writers, [], left))
            now = time.monotonic()
            if now >= self._next_look:
                self._next_look = now + LOOK_EVERY_S
                self._asleep_s += LOOK_EVERY_S * self._sleeps()
                if self._asleep_s >= SLEEP_LIMIT_S:
                    raise ChildAsleep(f"the process slept for {SLEEP_LIMIT_S} s")
            if now >= self._deadline:
                raise MachineBusy(f"no reply within {WALL_LIMIT_S:g} s: the machine is too busy")
            if ready:
                return

    def _sleeps(self) -> bool:
        """Whether neither the child nor a process that it started is running or waiting for its turn."""
        try:
            child = psutil.Process(self.process.pid)
            return not any(each.status() in _AWAKE for each in (child, *child.children(recursive=True)))
        except psutil.Error:
            return False  # it is ending; its pipe will say so

    def _ended(self) -> ChildEnded:
        try:
            return ChildEnded(self.process.wait(SLEEP_LIMIT_S))
        except subprocess.TimeoutExpired:
            return ChildEnded(None)
