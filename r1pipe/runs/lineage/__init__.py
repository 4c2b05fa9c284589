"""Where checkpoints come from, and which stages they fit.

lookup     the checkpoint of a run, a folder or a stage; where a recorded one is now
fit        whether a parent's shape, tokenizer and chat template fit the stage; its own ones, as overrides
ancestors  the walk back over weight and data edges, every hash on the way checked
"""

from r1pipe.runs.lineage.ancestors import Ancestor, ancestors
from r1pipe.runs.lineage.fit import UNLIKE, differs, measured_data, settings_of
from r1pipe.runs.lineage.lookup import (
    SearchPath,
    bundled,
    checkpoint_of_folder,
    checkpoint_of_run,
    is_run,
    newest_run,
    run_folders,
)
