"""MLflow, the index and face of the run folders; alone in importing mlflow, and only inside functions.

A pipeline is a parent run, each stage a child run with the same metric names, its checkpoint a
version of one registered model with the stage's name as alias. The light process that waits for a
job mirrors it; `sync` makes all of it again from the run folders, which stay the truth.

    database  the SQLite file that MLflow's store is by default: created once, moved along with its root
    store     which store, whether it can be used, a client of it; a model's address -> its checkpoint
    naming    config, record and metrics under the names that MLflow shows (pure)
    writer    one run folder written into MLflow
    sync      `r1pipe sync`: the run folders that MLflow lacks, or all of them again
    mirror    one run folder written while its job runs, in a thread
    ui        `r1pipe ui`: MLflow's pages
"""

from r1pipe.tracking.mirror import Mirror
from r1pipe.tracking.store import check_tracking, resolve_model, store_uri
from r1pipe.tracking.sync import sync
from r1pipe.tracking.ui import serve_ui
from r1pipe.tracking.writer import add_report

__all__ = ["Mirror", "add_report", "check_tracking", "resolve_model", "serve_ui", "store_uri", "sync"]
