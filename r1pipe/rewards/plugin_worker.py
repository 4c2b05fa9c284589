"""The process that runs plugins, the user's reward functions: JSON lines in and out (plugins.py asks).

First {"memory", "rewards": [{"name", "kind", "location", "source"}]} -> {"groups": [names]} or {"error"}.
Then {"name", "prompt", "completions", "cpu_s"} -> {"value", "status", "detail"} for each completion, a line
each; a value of null: the reward has no rule for this prompt. A call that takes more than `cpu_s` of
processor time ends the process by SIGPROF, one that runs out of memory with the code OUT_OF_MEMORY.
"""

import inspect
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, TextIO

from r1pipe.core.types import Completion, Message, Prompt, Score, Status
from r1pipe.rewards.programs.jailed import decode
from r1pipe.rewards.reply import DETAIL, score_of

OUT_OF_MEMORY = 12  # exit code, ENOMEM's number
GROUP_PARAMETER = "completions"  # what a function of a whole group calls its second parameter

Function = Callable[..., Any]


def load(rewards: list[dict[str, str]]) -> dict[str, Function]:
    """The functions by name; each file is run once. Raises TypeError on what is no reward, and what a file
    raises."""
    modules: dict[str, types.ModuleType] = {}
    functions: dict[str, Function] = {}
    for reward in rewards:
        name, location = reward["name"], reward["location"]
        if reward["kind"] == "entry_point":
            function = EntryPoint(name, location, "").load()
        else:
            if location not in modules:
                modules[location] = run_file(location, reward["source"])
            function = getattr(modules[location], name, None)
        functions[name] = checked(function, f"{name} in {location}")
    return functions


def run_file(location: str, source: str) -> types.ModuleType:
    """A file as a module. Its folder is the last place where `import` looks."""
    path = Path(location).resolve()
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    sys.path.append(str(path.parent))
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickle look there
    exec(compile(source, str(path), "exec"), module.__dict__)
    return module


def checked(function: Any, place: str) -> Function:
    """Raises TypeError on what cannot be called as a reward."""
    if not callable(function) or inspect.isclass(function):
        raise TypeError(f"{place} is no function")
    if inspect.iscoroutinefunction(function):
        raise TypeError(f"{place} is async; a reward is a plain function")
    try:
        inspect.signature(function).bind(None, None)
    except (TypeError, ValueError):
        raise TypeError(f"{place} must take (prompt, completion), or (prompt, completions)") from None
    return function


def takes_group(function: Function) -> bool:
    return [*inspect.signature(function).parameters][1:2] == [GROUP_PARAMETER]


def values_of(
    function: Function, prompt: Prompt, completions: list[Completion], cpu_s: float
) -> Iterator[dict[str, Any]]:
    """A reply for each completion: from one call each, or one call for all."""

    def of_one(completion: Completion) -> dict[str, Any]:
        return reply_of(function(prompt, completion))

    if not takes_group(function):
        for completion in completions:
            yield called(partial(of_one, completion), cpu_s)
        return

    def of_group() -> list[dict[str, Any]]:
        values = function(prompt, completions)
        if not isinstance(values, list | tuple) or len(values) != len(completions):
            length = f" of {len(values)}" if isinstance(values, list | tuple) else ""
            raise TypeError(f"returned a {type(values).__name__}{length}, not a list of {len(completions)}")
        return [reply_of(value) for value in values]

    replies = called(of_group, cpu_s)
    yield from replies if isinstance(replies, list) else [replies] * len(completions)


def called(call: Callable[[], Any], cpu_s: float) -> Any:
    """What a call returns; a reply without a verdict for what it raises."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    process = os.getpid()
    try:
        return call()
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except Exception as error:  # noqa: BLE001 - whatever a reward raises is no verdict
        return failed(explained(error))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        if os.getpid() != process:  # a fork of the reward's that came back from its call
            os._exit(0)


def reply_of(value: Any) -> dict[str, Any]:
    """Raises TypeError or ValueError on what is no score."""
    score = score_of(value)
    return asdict(Score(0.0) if score is None else score) | ({"value": None} if score is None else {})


def failed(detail: str) -> dict[str, Any]:
    return {"value": 0.0, "status": Status.VERIFIER_FAILED, "detail": detail[:DETAIL]}


def explained(error: Exception) -> str:
    """The error, and the line of the plugin's file where it arose."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    place = f" ({Path(frames[0].filename).name}:{frames[0].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}"[: DETAIL - len(place)] + place


def completion_of(row: dict[str, Any]) -> Completion:
    return Completion(row["tokens"], [], row["finish_reason"], row["text"])


def prompt_of(row: dict[str, Any]) -> Prompt:
    fields = decode(row)
    fields["context"] = tuple(Message(**message) for message in fields["context"])
    return Prompt(**fields)


def protocol() -> tuple[TextIO, TextIO]:
    """Requests and replies, out of a plugin's reach: what it prints goes to standard error."""
    requests, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return requests, replies


def end_with_parent() -> None:
    """End this process group once the job is gone, which alone limits the time that a call may sleep."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def serve() -> None:
    requests, replies = protocol()
    end_with_parent()

    def reply(content: dict[str, Any]) -> None:
        replies.write(json.dumps(content) + "\n")
        replies.flush()

    first = json.loads(requests.readline())
    resource.setrlimit(resource.RLIMIT_DATA, (first["memory"], first["memory"]))
    try:
        functions = load(first["rewards"])
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except Exception as error:  # noqa: BLE001 - whatever a file raises, there are no rewards to call
        reply({"error": explained(error)})
        os._exit(0)
    reply({"groups": [name for name, function in functions.items() if takes_group(function)]})
    for line in requests:
        request = json.loads(line)
        prompt, completions = prompt_of(request["prompt"]), [*map(completion_of, request["completions"])]
        for content in values_of(functions[request["name"]], prompt, completions, request["cpu_s"]):
            reply(content)
    os._exit(0)  # whatever threads a reward has left


if __name__ == "__main__":
    serve()
