"""MLflow, the index and face of the run folders; alone in importing mlflow, and only inside functions.

A pipeline is a parent run, each stage a child run with the same metric names, its checkpoint a
version of one registered model with the stage's name as alias. The light process that waits for a
job mirrors it; `sync` makes all of it again from the run folders, which stay the truth.

    store     which store, whether it can be used; a model's address -> its checkpoint; the UI
    naming    config, record and metrics under the names that MLflow shows (pure)
    index     one run folder written into MLflow
    mirror    that, while the job runs, in a thread
    behind    run folders that MLflow does not have wholly yet
    again     `r1pipe sync`: all of them, or a whole store made again
"""

from r1pipe.tracking.again import sync
from r1pipe.tracking.mirror import Mirror
from r1pipe.tracking.store import check_tracking, resolve_model, serve_ui, store_uri

__all__ = ["Mirror", "check_tracking", "resolve_model", "serve_ui", "store_uri", "sync"]
