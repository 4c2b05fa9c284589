"""MLflow as an index of the run folders. Only this package imports mlflow, and only inside functions.

A pipeline is a parent run, each stage a child run with the same metric names, its checkpoint a version of
one registered model with the stage's name as alias. The command that follows a job mirrors it; `sync` can
rebuild everything from the run folders, which are the source of truth.

    store     which store, whether it can be used, a client for it; a model's address -> its checkpoint;
              the SQLite file of the default store: created once, moved along with its root
    naming    config, record and metrics under the names that MLflow shows (pure)
    writer    writes one run folder into MLflow
    mirror    writes one run folder while its job runs, in a thread; `r1pipe sync`: those that MLflow lacks
    view      the charts that it opens with (pure)
    ui        `r1pipe ui`: MLflow's pages
"""

from r1pipe.tracking.mirror import Mirror, sync
from r1pipe.tracking.store import check_server_answers, resolve_model, store_uri
from r1pipe.tracking.ui import serve_ui
from r1pipe.tracking.writer import add_report
