"""Isolation for generated programs: no network, files or environment; time, memory, depth, output bounded.

Chosen by capability, program by program: Monty first (`monty.py`, under a millisecond); what that part of
Python cannot run, and what fails there by an exception, goes to CPython in bubblewrap (`jail.py`). Where
neither is to be had no program is run at all.

A program's fault (an exception, a limit, an interpreter that it brought down) is an outcome without results
and scores 0; VERIFIER_FAILED means that no interpreter here can run it, INFRASTRUCTURE_FAILED that the
isolation itself does not work.
"""

import functools
import importlib.util
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.types import Status
from r1pipe.rewards import isolation, jail
from r1pipe.rewards.isolation import Broken, Isolation, ProgramFault, Session, Unsupported, plain
from r1pipe.rewards.monty import Monty


@dataclass(frozen=True)
class Outcome:
    """What the calls returned, in order; `results` is None where the program failed, `detail` says how."""

    results: list[Any] | None
    detail: str = ""
    status: Status = Status.SCORED


class TestsFailed(Exception):
    """The tests ran, and the program did not pass them."""


class TestsUnsupported(Exception):
    """The interpreter of the tests (not that of the program) lacks something or was brought down."""


_choosing = threading.Lock()


def isolations() -> list[Isolation]:
    """What this machine has, in order of preference. Raises EnvironmentProblem where that is nothing."""
    with _choosing:  # threads that come first together must not each start a pool
        return choose()


@functools.cache
def choose() -> list[Isolation]:
    """The isolations of this machine; the same ones ever after."""
    found: list[Isolation] = []
    if importlib.util.find_spec("pydantic_monty"):
        found.append(Monty())
    if jail.working():
        found.append(jail.Jail())
    if not found:
        raise EnvironmentProblem(
            "no isolation for generated programs: run `pip install pydantic-monty`, or install bubblewrap"
        )
    return found


def run(program: str, entry_point: str, arguments: Sequence[Sequence[Any]]) -> Outcome:
    """Define the program, call `entry_point` once per argument list, and give back what the calls returned.

    Raises EnvironmentProblem where this machine has no isolation to offer.
    """

    def results(isolated: Isolation) -> Outcome:
        with isolated.session(isolation.TIME_LIMIT_S) as session:
            session.run(program)
            calls = f"[{entry_point}(*each) for each in _arguments]"
            found = session.run(calls, {"_arguments": [list(each) for each in arguments]})
            if not isinstance(found, list) or len(found) != len(arguments):  # a program may forge replies
                raise ProgramFault("not a result for each call", final=True)
            return Outcome(found)

    return _first_verdict(results)


def run_tests(program: str, entry_point: str, tests: str) -> Outcome:
    """Whether the program passes tests that are Python text; they call it by the name `candidate`.

    Program and tests are in two interpreters, and nothing but plain arguments and results goes between
    them: the program can neither read the tests nor change what they compare with. Results: [True], [False]
    or None.
    """

    def verdict(isolated: Isolation) -> Outcome:
        with isolated.session(isolation.TIME_LIMIT_S) as session:
            session.run(program)
            try:
                _examine(session, entry_point, tests)
            except TestsFailed as failure:
                return Outcome([False], str(failure))
            return Outcome([True])

    return _first_verdict(verdict)


def _first_verdict(judge: Callable[[Isolation], Outcome]) -> Outcome:
    """What the first isolation says that can say anything; exceptions in one are looked at by the next."""
    outcome = Outcome(None, "no verdict", Status.VERIFIER_FAILED)
    for isolated in isolations():
        try:
            return judge(isolated)
        except ProgramFault as fault:
            outcome = Outcome(None, str(fault))
            if fault.final:
                return outcome
        except (Unsupported, TestsUnsupported) as lack:
            outcome = Outcome(None, str(lack), Status.VERIFIER_FAILED)
        except Broken as problem:
            outcome = Outcome(None, str(problem), Status.INFRASTRUCTURE_FAILED)
    return outcome


def _examine(session: Session, entry_point: str, tests: str) -> None:
    """Run the tests against a program that is defined in `session`, in the first interpreter that can.

    Raises what the program raised, where it is to blame; TestsFailed; TestsUnsupported.
    """
    caught: list[Exception] = []

    def candidate(*arguments: Any, **keywords: Any) -> Any:
        call = f"{entry_point}(*_arguments, **_keywords)"
        try:
            return plain(session.run(call, {"_arguments": list(arguments), "_keywords": keywords}))
        except (ProgramFault, Unsupported, Broken) as error:
            caught.append(error)
            name = str(error).partition(":")[0]
            known = {kind.__name__: kind for kind in (ValueError, TypeError, KeyError, IndexError)}
            raise known.get(name, RuntimeError)(str(error)) from None

    lack = ""
    for isolated in isolations():
        caught.clear()
        try:
            with isolated.session(isolation.CHECK_LIMIT_S) as tester:
                tester.run(tests, host={"candidate": candidate})
        except (ProgramFault, Unsupported, Broken) as error:
            _blame_program(caught)
            missing = str(error).startswith(("ModuleNotFoundError", "ImportError"))  # of the tests' own
            if _ordinary(error) and not missing:
                raise TestsFailed(str(error)) from None
            lack = f"the tests cannot be run: {error}"
            continue
        # a fault that the tests expected and caught is no fault, but beyond a limit there is no passing
        _blame_program([error for error in caught if not _ordinary(error)])
        return
    raise TestsUnsupported(lack)


def _ordinary(error: Exception) -> bool:
    return isinstance(error, ProgramFault) and not error.final


def _blame_program(caught: list[Exception]) -> None:
    if caught:
        raise caught[0]
