"""Where checkpoints come from, and which stages they fit.

lookup     the checkpoint of a run, a folder or a stage; where a recorded one is now
fit        whether a parent's shape, tokenizer and chat template fit the stage
settings   a checkpoint's own shape and data, as overrides
ancestors  the walk back over weight and data edges, every hash on the way checked
"""

from r1pipe.runs.lineage.ancestors import Ancestor, ancestors
from r1pipe.runs.lineage.fit import differs
from r1pipe.runs.lineage.lookup import (
    SearchPath,
    bundled,
    checkpoint_of_folder,
    checkpoint_of_run,
    is_run,
    newest_run,
    run_folders,
)
from r1pipe.runs.lineage.settings import UNLIKE, measured_data, settings_of

__all__ = [
    "UNLIKE",
    "Ancestor",
    "SearchPath",
    "ancestors",
    "bundled",
    "checkpoint_of_folder",
    "checkpoint_of_run",
    "differs",
    "is_run",
    "measured_data",
    "newest_run",
    "run_folders",
    "settings_of",
]
