"""`r1pipe sync`: MLflow's view brought up to the run folders, or made again from them alone."""

from pathlib import Path
from typing import TYPE_CHECKING

from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.paths import RunFolder
from r1pipe.core.redaction import without_secrets
from r1pipe.tracking import behind
from r1pipe.tracking.index import PIPELINE, STAGE
from r1pipe.tracking.store import connect, failures, first_line, matching, store_uri

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient


def sync(
    root: Path | str, pipeline: str | None = None, uri: str | None = None, rebuild: bool = False
) -> tuple[int, list[str]]:
    """(Runs that MLflow now has wholly, ids of those that another process is mirroring meanwhile.)

    `pipeline`: that one's runs alone; `uri`: into this store, instead of the one that each run's config
    names. `rebuild` first deletes what the store has of these run folders, runs and model versions, and
    nothing else in it. Raises EnvironmentProblem.
    """
    written, busy = 0, []
    emptied: set[str] = set()
    for folder, config in behind.tracked(Path(root), pipeline):
        store = store_uri(folder.path.parent, uri or config["tracking"]["uri"])
        try:
            if rebuild and store not in emptied:
                emptied.add(store)
                forget(connect(store), folder.path.parent, pipeline)
            if behind.write(folder, config, store):
                written += 1
            else:
                busy.append(folder.run_id)
        except failures() as error:
            shown, reason = without_secrets(store), without_secrets(first_line(error))
            raise EnvironmentProblem(
                f"MLflow at {shown} does not take the run {folder.run_id}: {reason}; mend it, and sync again"
            ) from None
    return written, busy


def forget(client: "MlflowClient", root: Path, pipeline: str | None) -> None:
    """Delete the runs of the root's run folders from a store, with the model versions that they made.

    A run that is being mirrored now stays: its mirror would write into nothing. MLflow keeps what is deleted
    out of sight until `mlflow gc`.
    """
    kept_parents = set()
    runs = [run for run in everything(client) if run.data.tags.get("r1pipe.root") == str(root)]
    if pipeline is not None:
        runs = [run for run in runs if run.data.tags.get("r1pipe.launch.pipeline") == pipeline]
    for run in [run for run in runs if run.data.tags.get("r1pipe.kind") == STAGE]:
        hold = behind.Hold(RunFolder(run.data.tags["r1pipe.run_dir"]))
        if Path(run.data.tags["r1pipe.run_dir"]).is_dir() and not hold.take(wait=False):
            kept_parents.add(run.data.tags.get("mlflow.parentRunId"))
            continue
        try:
            for version in client.search_model_versions(matching("run_id", run.info.run_id)):
                client.delete_model_version(version.name, version.version)
            client.delete_run(run.info.run_id)
        finally:
            hold.release()
    for run in runs:
        if run.data.tags.get("r1pipe.kind") == PIPELINE and run.info.run_id not in kept_parents:
            client.delete_run(run.info.run_id)


def everything(client: "MlflowClient") -> list:
    """All runs of a store, whatever their experiment."""
    experiments = [one.experiment_id for one in client.search_experiments()]
    found, token = [], None
    while experiments:
        page = client.search_runs(experiments, page_token=token)
        found += page
        token = page.token
        if not token:
            break
    return found
