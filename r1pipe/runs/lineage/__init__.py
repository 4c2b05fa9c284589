"""Where checkpoints come from, and what they may be handed to.

places     the checkpoint of a run, a folder, or the newest run of a stage
fit        whether a parent's shape, tokenizer and chat template fit the stage
settings   a checkpoint's own shape and data, as overrides
moved      where a recorded checkpoint lies now
ancestors  the walk back over weight and data edges, every hash on the way checked
moved      where a recorded checkpoint lies now
"""

from r1pipe.runs.lineage.ancestors import Ancestor, ancestors
from r1pipe.runs.lineage.fit import check_parent_fits, differs
from r1pipe.runs.lineage.places import (
    BUNDLED,
    Place,
    bundled,
    is_run,
    newest,
    of_folder,
    of_run,
    of_stage,
    runs,
)
from r1pipe.runs.lineage.settings import UNLIKE, measured_data, settings_of
from r1pipe.runs.record import record_of

__all__ = [
    "BUNDLED",
    "UNLIKE",
    "Ancestor",
    "Place",
    "ancestors",
    "bundled",
    "check_parent_fits",
    "differs",
    "is_run",
    "measured_data",
    "newest",
    "of_folder",
    "of_run",
    "of_stage",
    "record_of",
    "runs",
    "settings_of",
]
