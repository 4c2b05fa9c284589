"""Ranks as forks of one process that has imported torch and DeepSpeed already: a job starts in a blink."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from faults.forks import free_port, warm

from r1pipe.config import read_config

LIMIT_S = 1800.0  # for anything, on however busy a machine: only a test that fails waits for so long


@contextmanager
def ranks(folder: Path, main: Callable[..., Any], count: int, *arguments: Any) -> Iterator[list[BaseProcess]]:
    """`main(folder, *arguments)` in `count` processes that find one another, as under the launcher."""
    forks, port = warm(), free_port()
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = []
    for rank in range(count):
        variables = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "DS_ACCELERATOR": "cpu"}
        process = forks.Process(target=_main, args=(main, folder, variables, arguments))
        process.start()
        started.append(process)
    try:
        yield started
    finally:
        for process in started:
            if process.is_alive():
                process.kill()
            process.join()


def _main(main: Callable[..., Any], folder: Path, variables: Mapping[str, str], arguments: tuple) -> None:
    if variables["WORLD_SIZE"] != "1":
        os.environ.update(variables)
    log = os.open(folder / f"out-{variables['RANK']}.txt", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["forked", str(folder)]
    main(folder, *arguments)


def codes(processes: list[BaseProcess]) -> list[int | None]:
    """Their exit codes, once all have ended."""
    for process in processes:
        process.join(LIMIT_S)
    return [process.exitcode for process in processes]


def wait_until(true: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {LIMIT_S:.0f} s"
        time.sleep(0.02)


def out(folder: Path) -> str:
    """What the ranks printed, for the message of a failed test."""
    config = read_config(folder / "config.json")
    texts = (folder / f"out-{rank}.txt" for rank in range(config.engine.ranks))
    return "\n".join(text.read_text()[-3000:] for text in texts if text.exists())


def trained_on_ranks(
    folder: Path, count: int, train: Callable[[Path, Any], dict[str, Any]], cases: Sequence[Any]
) -> list[dict[str, Any]]:
    """What `train` gives on rank 0 for each case, in turn, in one job of so many ranks."""
    import torch  # the users of this file that start no training do without

    with ranks(folder, _train_each, count, train, cases) as started:
        assert codes(started) == [0] * count, (folder / "out-0.txt").read_text()[-5000:]
    return [torch.load(folder / f"found-{number}.pt") for number in range(len(cases))]


def _train_each(folder: Path, train: Callable[[Path, Any], dict[str, Any]], cases: Sequence[Any]) -> None:
    import torch

    from r1pipe.train.engine.discovery import discover
    from r1pipe.train.engine.patches import exit_immediately_with

    torch.set_num_threads(1)
    for number, case in enumerate(cases):
        found = train(folder, case)
        if discover().rank == 0:
            torch.save(found, folder / f"found-{number}.pt")
    exit_immediately_with(0)


def trained_alike(found: dict[str, Any], expected: dict[str, Any], case: object, tolerance: float) -> None:
    """Asserts that two trainings had the same losses, gradient norms, weights and counts of tokens."""
    assert found["loads"] == expected["loads"], case  # a token that is dropped would be missing
    for key in ("losses", "norms"):
        assert found[key] == pytest.approx(expected[key], rel=tolerance), (case, key)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, tensor in expected["weights"].items():
        apart = (found["weights"][name] - tensor).abs().max().item()
        assert apart < tolerance * max(1.0, tensor.abs().max().item()), (case, name)
