"""A stage's DeepSpeed job: one that this command starts, or one that is running already."""

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
from r1pipe.core.errors import EnvironmentProblem, record_error
from r1pipe.core.paths import RunFolder
from r1pipe.launch import hosts as launch_hosts
from r1pipe.launch import slurm
from r1pipe.launch.command import checked_command, job_environment, printable, write_run_files
from r1pipe.launch.machines import Machines
from r1pipe.launch.progress import Display
from r1pipe.launch.watch import Fault, Watch, resume_hint
from r1pipe.runs import heartbeat, hosts, locks, processes, record, stopping
from r1pipe.tracking import Mirror

POLL_S = 0.1
LEAVING_S = 3.0  # from SIGTERM to SIGKILL, where there is nothing to wait for
AGENTS_S = 10.0  # for agents to end their ranks, and pdsh or srun to see it
ENDING_S = 15.0  # for the other ranks, after one has failed: they may wait for it forever
TAIL = 15  # lines of the log shown when a job fails without an error message of its own


class Job:
    """A stage's DeepSpeed job: `start` it or `attach` to it, then `follow` it, then `end` it.

    Its owner is the command that holds its lock, ends it where a rank was killed or is stuck, and mirrors it
    to MLflow.
    """

    process: subprocess.Popen[bytes] | processes.Foreign  # the launcher

    def __init__(self, config: RunConfig, run: RunFolder):
        self.run, self.config, self.engine = run, config, config.engine
        self.received_signal = 0  # the first one that this process got while it followed the job
        self._announced_signal, self._is_ending, self._kill_at = False, False, math.inf
        self._group = 0  # the process group of launcher and ranks
        self._owner = (0, 0.0)  # pid and start time of the command that owns the job, if it is another one
        self._fault: Fault | None = None
        self._lock: locks.Lock | None = None  # the owner's
        self._mirror: Mirror | None = None  # the owner's
        self._resources, self._handlers = ExitStack(), ExitStack()  # the owner's; of signals
        self.display = Display(run.path, config.stage.name)
        machines = Machines(run) if self.engine.has_agents else None
        self.watch = Watch(run, hosts.ranks(self.engine), self.engine.stuck_after_s, machines)

    @property
    def is_owner(self) -> bool:
        return self._lock is not None

    def start(self, changed: Sequence[Change] = (), sweep: str = "") -> list[Change]:
        """Start it, and own it; how code and versions differ from those of the run's last session.

        `changed`: the config values that differ from those of the run's last launch. Raises
        EnvironmentProblem if the machine lacks something, or another job has the run.
        """
        run = self.run
        line = checked_command(self.config, run)
        with ExitStack() as resources, ExitStack() as handlers:
            self._lock = resources.enter_context(locks.held(run))
            record.set_aside(run)
            record.note(run, changed)
            changed_code = write_run_files(self.config, run, line, sweep)
            for stale in (run.error, run.stop):
                stale.unlink(missing_ok=True)
            self._mirror = Mirror(run.path, to_mapping(self.config))
            resources.callback(self._mirror.finish)
            variables = resources.enter_context(job_environment(self.config, line, self._lock.token))
            if self.engine.has_agents:
                line = launch_hosts.give_orders(self.config, run, line, self._lock.token, variables)
            log = resources.enter_context(run.launcher_log.open("ab"))
            log.write(f"$ {printable(self.config, line)}\n".encode())
            log.flush()
            handlers.enter_context(stopping.handling(self._handle_signal))
            try:
                # in a session of its own, it gets a Ctrl-C once, through us, like every other signal
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
            if self.received_signal:
                self._end_start(self.received_signal)
            self._resources, self._handlers = resources.pop_all(), handlers.pop_all()
        return changed_code

    def attach(self, holder: locks.Holder) -> None:
        """Follow the job of `holder` (locks.job_of), which another command has started; own it if that
        command is dead."""
        self._owner, (self._group, began), *_ = holder.processes
        self.process = processes.Foreign(self._group, began, lambda: bool(locks.live_ranks(self.run, holder)))
        self._own_if_orphaned()
        self._handlers.enter_context(stopping.handling(self._handle_signal))

    def _own_if_orphaned(self) -> None:
        if processes.is_alive(*self._owner):
            return
        lock = locks.adopt(self.run)
        if lock is None:  # another command was quicker, or the job has ended
            self._owner = next(iter(locks.Holder.read(self.run.pid).processes), self._owner)
            return
        self._lock = lock
        with ExitStack() as resources:
            resources.callback(lock.release)
            self._mirror = Mirror(self.run.path, to_mapping(self.config))
            resources.callback(self._mirror.finish)
            self._resources = resources.pop_all()

    def follow(self) -> None:
        """Show the job until its record exists or it has ended, and pass signals on to it.

        Its owner mirrors it as well, and ends it where a rank was killed or is stuck. Raises
        EnvironmentProblem, once the job has been ended, where it cannot be watched any more.
        """
        with self._handlers, closing(self.display):
            try:
                while self.process.poll() is None and not self.run.record.exists():
                    self._check_folder()
                    self.display.poll()
                    if not self.is_owner:
                        self._own_if_orphaned()
                        if self.is_owner:
                            self.display.say(f"{self.run.run_id}: its command is gone; this one takes over")
                    if self._mirror and self._lock:
                        self._mirror.poll()
                        self._lock.renew()
                    if not self._is_ending:
                        self._end_if_due()
                    time.sleep(POLL_S)
            except EnvironmentProblem:  # MLflow's store or the folder: the job must not run unattended
                self._end_now()
                self._resources.close()
                raise

    def _check_folder(self) -> None:
        """Raises EnvironmentProblem where the run folder is gone; a late rank may have made an empty one."""
        if not self.run.config.exists():
            raise EnvironmentProblem(
                f"{self.run.path} was moved or removed while its job ran, which was ended; put it back, then "
                "run the same command: it resumes from the newest checkpoint"
            )

    def _end_if_due(self) -> None:
        if self.received_signal and not self._announced_signal:
            self._announced_signal = True
            self.display.say(
                f"{self.run.run_id}: saves a checkpoint and stops, within {self.engine.grace_s:g} s; "
                "the same signal again ends it at once"
            )
        fault = self.watch.check()
        if time.monotonic() > self._kill_at:
            reason = f"did not leave within engine.grace_s={self.engine.grace_s:g} and was ended"
            record_error(
                self.run.error, f"{self.run.run_id} was interrupted, {reason}; {resume_hint(self.run)}"
            )
            self._end_now()
        elif self.is_owner and fault:
            self._fault = fault
            record_error(self.run.error, fault.line)
            self._end_now()
        elif self.is_owner and self.watch.failed_for_s() > ENDING_S:
            self._end_now()

    def _handle_signal(self, number: int, frame: FrameType | None) -> None:
        """Ask the ranks to save and leave; end them at the second signal."""
        if self.received_signal:
            self._is_ending = True
            stopping.request(self.run.stop, number, at_once=True)
            if not self.engine.has_agents:  # which end their ranks
                self._signal_group(signal.SIGKILL)
            return
        self.received_signal, self._kill_at = number, time.monotonic() + self.engine.grace_s
        if heartbeat.read_all(self.run):
            stopping.request(self.run.stop, number)
        else:
            self._end_start(number)

    def _end_start(self, number: int) -> None:
        """End ranks that have not begun: there is nothing to save."""
        if self.engine.has_agents:
            stopping.request(self.run.stop, number, at_once=True)
        else:
            self._signal_group(number)

    def _signal_group(self, number: int) -> None:
        if self._group:
            with suppress(ProcessLookupError):  # it has just ended
                os.killpg(self._group, number)

    def _end_now(self) -> None:
        self._is_ending = True
        with suppress(FileNotFoundError):  # the folder is gone, which agents see, too
            stopping.request(self.run.stop, signal.SIGTERM, at_once=True)
        if self.engine.has_agents:
            ends_at = time.monotonic() + AGENTS_S
            while self.process.poll() is None and time.monotonic() < ends_at:
                time.sleep(POLL_S)
            processes.kill_tree(self._group)
        else:
            self._end_group(LEAVING_S)

    def _end_group(self, grace_s: float) -> None:
        """Let no rank outlive its launcher: it would write into a run that another job may resume."""
        members = processes.group(self._group)
        self._signal_group(signal.SIGTERM)
        _, survivors = psutil.wait_procs(members, timeout=grace_s)
        if survivors:
            self._signal_group(signal.SIGKILL)

    def _end_leftovers(self) -> None:
        if not self.engine.has_agents:
            self._end_group(self.engine.grace_s)
        elif self.is_owner and self.run.path.is_dir():  # machines out of sight may still have ranks
            locks.end_launch(self.run)

    def end(self) -> int:
        """Wait until the launcher has exited and MLflow has everything; the job's exit code.

        DeepSpeed's launcher does not pass on what killed its children. Raises EnvironmentProblem where the
        run folder is gone.
        """
        with self._resources:
            give_up_at = time.monotonic() + self.engine.grace_s
            while (code := self.process.poll()) is None:
                if time.monotonic() > give_up_at:
                    self._end_now()
                    give_up_at = math.inf
                time.sleep(POLL_S)
            self._end_leftovers()
            self._check_folder()
            if not self.run.record.exists() and not self.received_signal and not self._fault:
                self._fault = self.watch.final_check(code)
                if self._fault:
                    record_error(self.run.error, self._fault.line)
            self.run.stop.unlink(missing_ok=True)
        code = code if code >= 0 else 128 - code
        if self.run.record.exists():
            return code
        if self.received_signal:
            return 128 + self.received_signal
        if self._fault:
            return self._fault.code
        failed = [number for number in self.watch.exit_codes() if number > 0]
        if not failed:
            return code or 1
        # without a request to stop, ranks that left by a signal were ended because another one failed
        return min(failed, key=lambda number: number in stopping.EXIT_CODES)


def failure(run: RunFolder, code: int) -> str:
    """Why a job failed: its own error message, or else the end of its log."""
    if run.error.exists():
        return run.error.read_text(encoding="utf-8").strip()
    if code in stopping.EXIT_CODES:
        if line := slurm.let_go(run):
            return line
        state = "is done" if run.record.exists() else "was interrupted"
        return f"{run.run_id} {state}; {resume_hint(run)}"
    log = run.launcher_log
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    # DeepSpeed's launcher begins its own lines with a date in brackets
    job_lines = [line for line in lines if line.strip() and not line.startswith("[20")]
    return "\n".join([*job_lines[-TAIL:], f"the job ended with exit code {code}; its whole log: {log}"])
