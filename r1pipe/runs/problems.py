"""evaluation.parquet: every completion of a run's final evaluation with its verdict, a row each.

It is what two checkpoints are compared by, problem by problem (r1pipe.runs.paired).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from r1pipe.core.errors import CheckpointError
from r1pipe.core.paths import RunFolder
from r1pipe.core.types import Message

GREEDY = -1  # the `draw` of a greedy completion
COLUMNS = {  # name -> kind
    "prompt_id": "str",
    "question_hash": "str",
    "task": "str",
    "language": "str",
    "level": "int",
    "subject": "str",
    "question": "str",
    "answer": "str",
    "draw": "int",
    "completion": "str",
    "tokens": "int",
    "truncated": "bool",
    "correct": "bool",
    "vote": "str",
    "f1": "float",
}


@dataclass
class Problem:
    """One problem's verdicts in an evaluation."""

    prompt_id: str
    question: str
    question_hash: str  # of all that was asked
    drawn: list[bool | None] = field(default_factory=list)  # whether each sample is right; None: unscored
    greedy: bool | None = None

    @property
    def share(self) -> float | None:
        """The share of its scored samples that is right; of a greedy evaluation alone, 1 or 0."""
        scored = [right for right in self.drawn if right is not None]
        if scored:
            return sum(scored) / len(scored)
        return None if self.drawn or self.greedy is None else float(self.greedy)


def question_hash(question: str, context: Sequence[Message] = ()) -> str:
    """SHA-256 of a question and the turns before it."""
    turns = "".join(f"{turn.role}|{turn.content}|" for turn in context)
    return hashlib.sha256(f"{turns}{question}".encode("utf-8", "surrogatepass")).hexdigest()


def read_problems(run: RunFolder) -> list[Problem]:
    """The problems of a run's evaluation, in its order. Raises CheckpointError where there are none."""
    import pyarrow.parquet as pq  # takes a tenth of a second; only commands that read it need it

    from r1pipe.runs.samples import reading

    path = run.completions
    if not path.is_file():
        raise CheckpointError(
            f"{run.run_id} has no {path.name}: it measured nothing, or an older version made it; "
            f"`r1pipe eval {run.run_id}` makes one"
        )
    names = ["prompt_id", "question", "question_hash", "draw", "correct"]
    with reading(path, "evaluate it again"):
        rows = pq.read_table(path, columns=names).to_pylist()
    problems: dict[str, Problem] = {}
    for row in rows:
        key = row["question_hash"] + row["prompt_id"]
        problem = problems.setdefault(key, Problem(row["prompt_id"], row["question"], row["question_hash"]))
        if row["draw"] == GREEDY:
            problem.greedy = row["correct"]
        else:
            problem.drawn.append(row["correct"])
    return list(problems.values())
