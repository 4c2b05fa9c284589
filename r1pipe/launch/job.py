"""A stage's DeepSpeed job as a command follows it: one that it starts, or one that is running already."""

import math
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from types import FrameType

import psutil

from r1pipe.config import RunConfig, to_mapping
from r1pipe.config.changes import Change
from r1pipe.core.errors import EnvironmentProblem, warn_once
from r1pipe.core.paths import RunFolder
from r1pipe.launch.command import checked, no_mlflow, printable, variables_of, write_down
from r1pipe.launch.progress import Display
from r1pipe.launch.watch import Fault, Watch, goes_on
from r1pipe.runs import heartbeat, history, locks, processes, stopping
from r1pipe.tracking import Mirror

POLL_S = 0.1
LEAVING_S = 3.0  # from SIGTERM to SIGKILL, where there is nothing to wait for
ENDING_S = 15.0  # for the other ranks, after one has failed: they may wait for it for ever
TAIL = 15  # lines of the log shown when a job fails without a line of its own


class FollowedJob:
    """A stage's DeepSpeed job, from its start until its launcher has gone.

    Its owner is the command that keeps its lock, ends it where a rank was killed or is stuck, and mirrors it
    to MLflow.
    """

    process: subprocess.Popen[bytes] | processes.Foreign  # the launcher
    _held: ExitStack
    _signals: ExitStack

    def __init__(self, config: RunConfig, run: RunFolder):
        self.run, self.config, self.engine = run, config, config.engine
        self.caught = 0  # the signal that this process got while it followed the job
        self.changed_code: list[Change] = []
        self._told, self._over, self._kill_at = False, False, math.inf
        self._group = 0  # the process group of launcher and ranks
        self._fault: Fault | None = None
        self._lock: locks.Lock | None = None  # the owner's
        self._mirror: Mirror | None = None  # the owner's
        self.display = Display(run.path, config.stage.name)
        ranks = self.engine.ranks if self.engine.hostfile is None else None
        self.watch = Watch(run, ranks, self.engine.stuck_after_s)

    @property
    def is_owner(self) -> bool:
        return self._lock is not None

    def follow(self) -> None:
        """Show the job until its record is there or it has ended, and pass signals on to it.

        Its owner mirrors it as well, and ends it where a rank was killed or is stuck.
        """
        with self._signals, closing(self.display):
            try:
                while self.process.poll() is None and not self.run.record.exists():
                    self.display.poll()
                    self._look_after()
                    self._end_if_due()
                    time.sleep(POLL_S)
            except EnvironmentProblem:  # a tracker that must work at the start does not: no job goes on alone
                self._end_now()
                self._held.close()
                raise

    def _look_after(self) -> None:
        """What the owner of a job does while it runs."""
        if self._mirror and self._lock:
            self._mirror.poll()
            self._lock.renew()

    def _end_if_due(self) -> None:
        if self._over:
            return
        if self.caught and not self._told:
            self._told = True
            self.display.say(
                f"{self.run.run_id}: leaves with a checkpoint, within {self.engine.grace_s:g} s; "
                "the same signal again ends it at once"
            )
        fault = self.watch.look()
        if time.monotonic() > self._kill_at:
            why = f"did not leave within engine.grace_s={self.engine.grace_s:g} and was ended"
            warn_once(self.run.error, f"{self.run.run_id} was interrupted, {why}; {goes_on(self.run)}")
            self._end_now()
        elif not self.is_owner:
            return
        elif fault and self._fault is None:
            self._fault = fault
            warn_once(self.run.error, fault.line)
            self._end_now()
        elif self.watch.failed_for_s() > ENDING_S:
            self._end_now()

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """Ask the ranks to save and leave; at the second time end them."""
        if self.caught:
            self._over = True
            stopping.request(self.run.stop, number, at_once=True)
            self._signal(signal.SIGKILL)
            return
        self.caught, self._kill_at = number, time.monotonic() + self.engine.grace_s
        if heartbeat.read_all(self.run):
            stopping.request(self.run.stop, number)
        else:  # they have not begun: nothing to save
            self._signal(number)

    def _signal(self, number: int) -> None:
        if self._group:
            with suppress(ProcessLookupError):  # it ended in this moment
                os.killpg(self._group, number)

    def _end_now(self) -> None:
        self._over = True
        stopping.request(self.run.stop, signal.SIGTERM, at_once=True)
        self._sweep(LEAVING_S)

    def _sweep(self, grace_s: float) -> None:
        """Let no rank outlive its launcher: it would go on writing into a run that another may take up."""
        left = processes.group(self._group)
        self._signal(signal.SIGTERM)
        _, stubborn = psutil.wait_procs(left, timeout=grace_s)
        if stubborn:
            self._signal(signal.SIGKILL)

    def end(self) -> int:
        """Wait until the launcher has gone and MLflow has everything; the job's exit code."""
        with self._held:
            try:
                code = self.process.wait(self.engine.grace_s)
            except subprocess.TimeoutExpired:
                self._end_now()
                code = self.process.wait()
            self._sweep(self.engine.grace_s)
            if not self.run.record.exists() and not self.caught and not self._fault:
                self._fault = self.watch.last_look(code)
                if self._fault:
                    warn_once(self.run.error, self._fault.line)
            self.run.stop.unlink(missing_ok=True)
        return self._exit_code(code)

    def _exit_code(self, launcher: int) -> int:
        """The job's, from that of DeepSpeed's launcher: it forgets what its children were killed by."""
        own = launcher if launcher >= 0 else 128 - launcher
        if self.run.record.exists():
            return own
        if self.caught:
            return 128 + self.caught
        if self._fault:
            return self._fault.code
        failed = [code for code in self.watch.exit_codes() if code > 0]
        # nobody asked the job to stop: ranks that left by a signal were ended since another one failed
        return min(failed, key=lambda code: code in stopping.EXIT_CODES) if failed else own or 1


class Job(FollowedJob):
    """One that this command starts, and owns."""

    def __init__(self, config: RunConfig, run: RunFolder, changed: Sequence[Change] = (), sweep: str = ""):
        """Start it; `changed`: what the run goes on with that it did not begin with.

        Raises EnvironmentProblem if the machine lacks something, or another job has the run.
        """
        super().__init__(config, run)
        line = checked(config, run)
        with ExitStack() as stack, ExitStack() as signals:
            self._lock = stack.enter_context(locks.held(run))
            history.set_record_aside(run)
            history.note(run, changed)
            self.changed_code = write_down(config, run, line, sweep)
            for left in (run.error, run.stop):
                left.unlink(missing_ok=True)
            self._mirror = Mirror(run.path, to_mapping(config))
            stack.callback(self._mirror.finish)
            variables = variables_of(config, stack.enter_context(no_mlflow()))
            log = stack.enter_context(run.launcher_log.open("ab"))
            log.write(f"$ {printable(config, line)}\n".encode())
            log.flush()
            signals.enter_context(stopping.handling(self._pass_on))
            try:
                # In a session of its own, it gets a Ctrl-C once, through us, as every other signal.
                self.process = subprocess.Popen(
                    line,
                    env=variables,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            except OSError as error:
                raise EnvironmentProblem(
                    f"{line[0]} cannot be started ({error.strerror}); install deepspeed again"
                ) from None
            self._group = self.process.pid
            self._lock.add(self._group)
            if self.caught:
                self._signal(self.caught)
            self._held, self._signals = stack.pop_all(), signals.pop_all()


class AttachedJob(FollowedJob):
    """A job that another command has started. If that command is gone, this one is the owner in its place."""

    def __init__(self, config: RunConfig, run: RunFolder, holder: locks.Holder):
        """Follow the job of `holder` (locks.job_of)."""
        super().__init__(config, run)
        self._command, (self._group, began), *_ = holder.processes
        self.process = processes.Foreign(self._group, began, lambda: bool(locks.live_ranks(run, holder)))
        self._held = ExitStack()
        self._take_over()
        with ExitStack() as signals:
            signals.enter_context(stopping.handling(self._pass_on))
            self._signals = signals.pop_all()

    def _look_after(self) -> None:
        if not self.is_owner and self._take_over():
            self.display.say(f"{self.run.run_id}: its command is gone; this one takes over")
        super()._look_after()

    def _take_over(self) -> bool:
        """Become the owner where the command that was it is dead; whether this is the owner now."""
        if processes.is_alive(*self._command):
            return False
        lock = locks.adopt(self.run)
        if lock is None:  # another one was quicker, or the job has ended
            holder = locks.Holder.read(self.run.pid)
            self._command = holder.processes[0] if holder and holder.processes else self._command
            return False
        with ExitStack() as stack:
            self._lock = lock
            stack.callback(lock.release)
            self._mirror = Mirror(self.run.path, to_mapping(self.config))
            stack.callback(self._mirror.finish)
            self._held = stack.pop_all()
        return True


def failure(run: RunFolder, code: int) -> str:
    """What to tell about a failed job: the line it left for the user, or else the end of its log."""
    if run.error.exists():
        return run.error.read_text(encoding="utf-8").strip()
    if code in stopping.EXIT_CODES:
        state = "is done" if run.record.exists() else "was interrupted"
        return f"{run.run_id} {state}; {goes_on(run)}"
    log = run.launcher_log
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if told(line)]
    return "\n".join([*lines[-TAIL:], f"the job ended with exit code {code}; its whole log: {log}"])


def told(line: str) -> bool:
    """Whether a line comes from the job: DeepSpeed's launcher marks its own with a date in brackets."""
    return bool(line.strip()) and not line.startswith("[20")
