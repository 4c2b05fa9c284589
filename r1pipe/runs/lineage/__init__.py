"""Where checkpoints come from, and what they may be handed to.

places     a CHECKPOINT that a user names -> its folder and hash
fit        whether a parent's shape, tokenizer and chat template fit the stage
settings   a checkpoint's own shape and data, as overrides
edges      a config's parents filled in
ancestors  the walk back over weight and data edges, every hash on the way checked
tree, page the walk drawn: in the terminal, as one HTML file
"""

from r1pipe.cli.lineage_tree import show
from r1pipe.runs.lineage.ancestors import Ancestor, ancestors
from r1pipe.runs.lineage.edges import with_open_parents, with_parents
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
    resolve,
    runs,
)
from r1pipe.runs.lineage.settings import UNLIKE, measured_data, settings_of
from r1pipe.runs.recorded import record_of

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
    "resolve",
    "runs",
    "settings_of",
    "show",
    "with_open_parents",
    "with_parents",
]
