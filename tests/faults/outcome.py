"""What a fault did: the row of a table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """One kind of fault, tried several times.

    Each module here has `run(folder: Path, seed: int, short: bool) -> Iterator[Outcome]`; `folder` is empty
    and its own, and `short` asks for the form that `make test` has time for.
    """

    fault: str  # what was done to the run
    tried: int
    held: int  # how often nothing was lost
    told: str  # the line that a user saw, or what was lost the first time
