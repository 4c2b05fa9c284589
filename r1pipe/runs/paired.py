"""Two evaluations of the same problems, compared problem by problem: how far apart, how surely, and where."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from r1pipe.core.errors import CheckpointError
from r1pipe.core.estimates import Z
from r1pipe.runs.problems import Problem, read_problems
from r1pipe.runs.results import StoredRun

METHOD = "normal, over the differences of single problems"
ALIKE = ("samples", "temperature", "top_p", "max_tokens")  # of stage.eval: what else makes a fair comparison


@dataclass(frozen=True)
class PairedProblem:
    """One problem in both evaluations: the share of right samples in each."""

    prompt_id: str
    question: str
    a: float
    b: float

    @property
    def difference(self) -> float:
        return self.a - self.b


@dataclass(frozen=True)
class PairedComparison:
    """What two runs' evaluations say, problem by problem. `difference` is a - b, in 0..1."""

    a: str  # run ids
    b: str
    pairs: tuple[PairedProblem, ...]
    unscored: int  # problems without a verdict in one of the two
    notes: tuple[str, ...]  # what else differs between the evaluations

    def mean(self, side: str) -> float:
        return sum(getattr(pair, side) for pair in self.pairs) / len(self.pairs)

    @property
    def interval(self) -> list[float] | None:
        """95%: the mean difference -+ 1.96 standard deviations of single differences / sqrt(problems).

        None of one problem, and where all differ alike: the deviation then says nothing.
        """
        count, mean = len(self.pairs), self.mean("difference")
        spread = sum((pair.difference - mean) ** 2 for pair in self.pairs)
        if count < 2 or spread < 1e-12:
            return None
        half = Z * math.sqrt(spread / (count - 1) / count)
        return [max(-1.0, mean - half), min(1.0, mean + half)]

    @property
    def won(self) -> list[PairedProblem]:
        """The problems that a solves more often, the clearest first."""
        return sorted((p for p in self.pairs if p.difference > 0), key=lambda p: (-p.difference, p.prompt_id))

    @property
    def lost(self) -> list[PairedProblem]:
        return sorted((p for p in self.pairs if p.difference < 0), key=lambda p: (p.difference, p.prompt_id))

    def as_object(self) -> dict[str, Any]:
        """For scripts."""
        return {
            "a": {"run_id": self.a, "pass_at_1": self.mean("a")},
            "b": {"run_id": self.b, "pass_at_1": self.mean("b")},
            "problems": len(self.pairs),
            "unscored": self.unscored,
            "difference": self.mean("difference"),
            "interval_95": self.interval,
            "method": METHOD,
            "wins": len(self.won),
            "losses": len(self.lost),
            "ties": len(self.pairs) - len(self.won) - len(self.lost),
            "notes": list(self.notes),
            "won": [asdict(pair) for pair in self.won],
            "lost": [asdict(pair) for pair in self.lost],
        }


def compare(a: StoredRun, b: StoredRun) -> PairedComparison:
    """Raises CheckpointError where a run kept no completions, or the two were asked different problems."""
    ours, theirs = (_by_question(read_problems(run.folder)) for run in (a, b))
    shared = ours.keys() & theirs.keys()
    names = a.folder.run_id, b.folder.run_id
    if ours.keys() != theirs.keys():
        raise CheckpointError(
            f"{names[0]} and {names[1]} were not asked the same problems ({len(ours)} and {len(theirs)}, "
            f"{len(shared)} of them in both); evaluate both with the same benchmark, data, prompt and "
            "stage.eval.problems"
        )
    scored = [
        PairedProblem(problem.prompt_id, problem.question, one, other)
        for key, problem in ours.items()
        if (one := problem.share) is not None and (other := theirs[key].share) is not None
    ]
    if not scored:
        raise CheckpointError(f"{names[0]} and {names[1]} have no problem with a verdict in both")
    return PairedComparison(
        *names, tuple(scored), len(ours) - len(scored), tuple(_unlike(a.config, b.config))
    )


def _by_question(problems: list[Problem]) -> dict[str, Problem]:
    return {problem.question_hash + problem.prompt_id: problem for problem in problems}


def _unlike(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    """Settings in which the two evaluations differ, besides the checkpoint."""
    evaluations = [config.get("stage", {}).get("eval") or {} for config in (a, b)]
    values = {f"stage.eval.{key}": tuple(each.get(key) for each in evaluations) for key in ALIKE}
    for key, (one, other) in {"seed": (a.get("seed"), b.get("seed")), **values}.items():
        if one != other:
            yield f"{key}: {one} and {other}"
