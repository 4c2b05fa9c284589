"""reasoning-gym's tasks by name, and its own scorers of answers to them.

Several scorers hand an answer to `eval` or sympy: countdown's evaluates "(4 + 3) * 2", and would evaluate
"__import__('os').system('...')" too. The scorers of one version have been traced through the package's code
(tests/test_gym_answers.py repeats it): those that evaluate answers are refused here, unless right answers
have a grammar in which nothing can be named or called. Scorers of other versions are not used at all.
"""

import functools
import importlib.metadata
import re
from typing import Any

from r1pipe.core.errors import ConfigError, EnvironmentProblem, nearest

VERSION = "0.1.25"  # of reasoning-gym, whose scorers the two tables below are about
REFUSED = {
    "bitwise_arithmetic",
    "intermediate_integration",
    "number_sorting",
    "polynomial_multiplication",
    "simple_integration",
}
_ARITHMETIC = re.compile(r"(?!.*(?:\*\s*\*|/\s*/))[\d+*/() -]+")  # no powers: 9**9**9 takes all there is
GRAMMARS = {  # what an answer may be written with, for the other tasks whose scorer evaluates it
    "countdown": _ARITHMETIC,
    "puzzle24": _ARITHMETIC,
    "binary_matrix": re.compile(r"[\d\s]+"),
    "n_queens": re.compile(r"[Q_\s]+"),
    "spiral_matrix": re.compile(r"[\d\s-]+"),
    "string_insertion": re.compile(r"[A-Z]+"),
}
_LONGEST = 1000  # characters of an answer with a grammar; right ones are shorter

CHUNK = 500  # problems per generator: some tasks prepare all of theirs when they are made
CHUNKS = 2**20  # generators per task, told apart by their seeds


@functools.lru_cache(maxsize=256)
def dataset(task: str, chunk: int = 0) -> Any:
    """A generator of the task with its own settings; making one may take seconds.

    Raises ConfigError on a task that is unknown, needs settings or would evaluate answers as Python,
    EnvironmentProblem without the package or with another version of it.
    """
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise EnvironmentProblem(
            f"data=reasoning_gym: {error}; run `pip install reasoning-gym=={VERSION}`"
        ) from None
    if (version := importlib.metadata.version("reasoning-gym")) != VERSION:
        raise EnvironmentProblem(
            f"data=reasoning_gym: the scorers of reasoning-gym {version} may evaluate answers as Python; "
            f"run `pip install reasoning-gym=={VERSION}`, whose scorers are known"
        )
    if task not in DATASETS:
        raise ConfigError(f"data.tasks: reasoning-gym has no task {task}; {nearest(task, DATASETS)}")
    if task in REFUSED:
        raise ConfigError(
            f"data.tasks: the scorer of {task} evaluates text as Python, so it cannot be used; leave it out. "
            f"Similar tasks that can be used: {', '.join(GRAMMARS)}"
        )
    try:
        # an item depends on seed + index: seeds a chunk apart make no item twice
        return create_dataset(task, size=CHUNK, seed=chunk % CHUNKS * CHUNK)
    except (AssertionError, ValueError) as error:
        raise ConfigError(
            f"data.tasks: {task} cannot be used by its name alone ({error}); leave it out"
        ) from None


def score(task: str, entry: dict[str, Any], answer: str) -> float:
    """The task's own score of an answer, 0 to 1; 0 where its scorer must not see it.

    A scorer may hang or eat memory, so only the verifier's worker calls this. Raises as `dataset` does.
    """
    scorer = dataset(task)
    grammar = GRAMMARS.get(task)
    if grammar is not None and (len(answer) > _LONGEST or not grammar.fullmatch(answer)):
        return 0.0
    return float(scorer.score_answer(answer, entry))
