"""Writes one run folder into MLflow. Writing it again updates what exists and duplicates nothing."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from r1pipe.config import RunConfig
from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.paths import RunFolder, inside
from r1pipe.runs import results
from r1pipe.runs.files import Tail
from r1pipe.runs.record import Record, read_record
from r1pipe.runs.story import sentences
from r1pipe.tracking import naming, store
from r1pipe.tracking.naming import PIPELINE, STAGE

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

METRICS_PER_BATCH = 1000  # MLflow's limits
PARAMS_PER_BATCH = 100
MAX_RUNS = 50_000  # of one search
DIGEST_LENGTH = 36
ROLLOUT_BYTES = 256 * 2**20  # the newest rollout files up to this size are copied; all stay in the run folder
REPORT, CURVES, CARDS = "report.html", "curves.png", "cards"  # beside the run folders


def search(client: "MlflowClient", experiment: str, **tags: str) -> "list[Run]":
    """The experiment's runs with all these `r1pipe.` tags. Raises EnvironmentProblem, MlflowException."""
    query = " and ".join(store.matching(f"tags.`r1pipe.{name}`", value) for name, value in tags.items())
    return list(client.search_runs([experiment], query, max_results=MAX_RUNS))


def pipeline_run(client: "MlflowClient", experiment: str, pipeline: str, root: Path) -> str | None:
    """The id of a pipeline's run. A root that was moved is recognised by the ids of its run folders."""
    parents = {run.info.run_id: run for run in search(client, experiment, kind=PIPELINE, pipeline=pipeline)}
    for run_id, run in parents.items():
        if run.data.tags.get("r1pipe.root") == str(root):
            return run_id
    for stage in search(client, experiment, kind=STAGE) if parents else ():
        parent = stage.data.tags.get("mlflow.parentRunId")
        if parent in parents and (root / stage.data.tags["r1pipe.run_id"]).is_dir():
            return parent
    return None


def add_report(config: RunConfig, page: Path) -> None:
    """Log the report to the pipeline's run; a failure is only a warning, as the report itself exists."""
    if not config.tracking.enabled:
        return
    root = Path(config.root).resolve()
    try:
        client = store.connect(store.store_uri(root, config.tracking.uri))
        experiment = client.get_experiment_by_name(config.tracking.experiment)
        parent = pipeline_run(client, experiment.experiment_id, config.pipeline, root) if experiment else None
        if parent:
            log_report(client, parent, page.parent)
    except store.failures() as error:
        print(f"warning: MLflow does not take {page}: {store.first_line(error)}", file=sys.stderr)
    except EnvironmentProblem as error:
        print(f"warning: {error}", file=sys.stderr)


def log_report(client: "MlflowClient", parent: str, root: Path) -> None:
    """The report, its curves and the cards, those of them that exist."""
    for path in filter(Path.exists, (root / REPORT, root / CURVES)):
        client.log_artifact(parent, str(path))
    for path in sorted((root / CARDS).glob("*.md")):
        client.log_artifact(parent, str(path), CARDS)


class RunWriter:
    """Writes a run folder as an MLflow run, a child of its pipeline's run."""

    def __init__(self, folder: RunFolder, config: dict, uri: str):
        """Find or create the runs. Raises EnvironmentProblem or MlflowException."""
        self.folder, self.config, self.root = folder, config, folder.path.parent
        self.sweep = folder.sweep.read_text(encoding="utf-8") if folder.sweep.exists() else None
        self.client = store.connect(uri)
        self._tail = Tail(folder.metrics)
        self._unsent: list[tuple[str, float, int, float]] = []  # (name, value, step, seconds)
        self._last_step: dict[str, int] = {}
        with store.locked(self.root):  # of two processes that start a pipeline together, one creates its run
            self.parent_id, self.run_id = self._open_runs(uri)
        run = self.client.get_run(self.run_id)
        self._trips = {key: text for key, text in run.data.tags.items() if key.startswith(naming.TRIPWIRE)}
        self._start_ms = run.info.start_time
        for name in run.data.metrics:  # the last step of each metric of a resumed run
            history = self.client.get_metric_history(self.run_id, name)
            self._last_step[name] = max(point.step for point in history)
        if not run.data.params:
            from mlflow.entities import Param

            params = [Param(key, value) for key, value in naming.flatten(config).items()]
            for start in range(0, len(params), PARAMS_PER_BATCH):
                self.client.log_batch(self.run_id, params=params[start : start + PARAMS_PER_BATCH])

    def _open_runs(self, uri: str) -> tuple[str, str]:
        """The ids of the stage's run and of its parent, the run of its pipeline or of its sweep."""
        name = self.config["tracking"]["experiment"]
        found = self.client.get_experiment_by_name(name)
        if found is None:
            artifacts = None if store.is_server(uri) else store.artifact_folder(self.root).as_uri()
            kind = {"mlflow.experimentKind": "custom_model_development"}  # else the UI expects chat traces
            experiment = self.client.create_experiment(name, artifact_location=artifacts, tags=kind)
        else:
            experiment = found.experiment_id
        pipeline, stage, run_id = str(self.config["pipeline"]), self.config["stage"], self.folder.run_id
        group = self.sweep or pipeline
        common = {"r1pipe.pipeline": group, "r1pipe.root": str(self.root)}
        parent = pipeline_run(self.client, experiment, group, self.root)
        parent = self._open(experiment, parent, group, {**common, "r1pipe.kind": PIPELINE})
        tags = {
            **common,
            "mlflow.parentRunId": parent,
            "mlflow.source.name": f"stages/{stage['script']}",
            "r1pipe.pipeline": pipeline,
            "r1pipe.kind": STAGE,
            "r1pipe.run_dir": str(self.folder.path),
            "r1pipe.run_id": run_id,
            "r1pipe.stage": stage["name"],
        }
        existing = [run.info.run_id for run in search(self.client, experiment, kind=STAGE, run_id=run_id)]
        name = f"{stage['name']} seed {self.config['seed']} ({run_id.rpartition('-')[2]})"
        return parent, self._open(experiment, existing[0] if existing else None, name, tags)

    def _open(self, experiment: str, run_id: str | None, name: str, tags: dict[str, str]) -> str:
        """Set a run's status to running and update its name and tags; create it if `run_id` is None."""
        if run_id is None:
            began_ms = int(self.folder.config.stat().st_mtime * 1000)
            tags = {**tags, "mlflow.user": os.environ.get("USER", "r1pipe")}
            return self.client.create_run(experiment, began_ms, tags, name).info.run_id
        self.client.update_run(run_id, status="RUNNING", name=name)
        for key, value in tags.items() - self.client.get_run(run_id).data.tags.items():
            self.client.set_tag(run_id, key, value)
        return run_id

    def send_lines(self) -> None:
        """Log what the job has written to metrics.jsonl and tripwires.jsonl so far.

        Steps that were logged before a resumed job went back stay as they are. A tripwire is a tag, which
        goes when a resumed job has truncated its line.
        """
        from mlflow.entities import Metric

        for line in self._tail.read():
            step, seconds = line.get("step"), line.get("time", 0.0)
            if not isinstance(step, int) or not naming.is_number(seconds):
                continue
            for name, value in naming.points(line):
                if step > self._last_step.get(name, -1):
                    self._last_step[name] = step
                    self._unsent.append((name, value, step, seconds))
        while self._unsent:  # kept until MLflow has taken them
            batch = self._unsent[:METRICS_PER_BATCH]
            metrics = [Metric(name, v, self._start_ms + int(1000 * s), step) for name, v, step, s in batch]
            self.client.log_batch(self.run_id, metrics=metrics)
            del self._unsent[: len(batch)]
        trips = naming.trips(Tail(self.folder.tripwires).read())
        for key in self._trips.keys() - trips.keys():
            self.client.delete_tag(self.run_id, key)
        for key, text in trips.items() - self._trips.items():
            self.client.set_tag(self.run_id, key, text)
        self._trips = trips

    def end(self) -> str | None:
        """Log the finished job; the registered model's address. Without a record the run has failed."""
        folder = self.folder
        record = read_record(folder.record) if folder.record.exists() else None
        address, ended_ms = None, None
        named = (folder.config, folder.env, folder.command, folder.evaluation, folder.samples, folder.record)
        for path in (*named, folder.dev_evaluations, folder.data / "funnel.json", folder.error):
            if path.exists():
                self.client.log_artifact(self.run_id, str(path))
        room = ROLLOUT_BYTES
        for path in sorted(folder.rollouts.glob("*"), key=lambda file: file.stat().st_mtime, reverse=True):
            room -= path.stat().st_size
            if room >= 0:
                self.client.log_artifact(self.run_id, str(path), "rollouts")
        if record:
            ended_ms = int(folder.record.stat().st_mtime * 1000)
            self._log_record(record, ended_ms)
            address = self._register(record)
        self._describe_pipeline()
        for run_id in (self.run_id, self.parent_id):
            self.client.set_terminated(run_id, "FINISHED" if record else "FAILED", ended_ms)
        return address

    def _log_record(self, record: Record, ended_ms: int) -> None:
        """What the run read, and the final metrics, one value each; on the pipeline's run these are at the
        stage's place in the recipe.

        They are logged at step 0: MLflow's UI draws such metrics as bars, and logging them again adds no row.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, RunTag

        final = naming.final_metrics(record)
        self.client.log_batch(
            self.run_id,
            metrics=[Metric(name, value, ended_ms, 0) for name, value in final.items()],
            tags=[RunTag(f"r1pipe.{name}", value) for name, value in naming.provenance(record).items()],
        )
        stages = self.config["recipe"]["stages"]
        if record["stage"] in stages and not self.sweep:
            place = stages.index(record["stage"])
            points = naming.series(final).items()
            summary = [Metric(name, value, ended_ms, place) for name, value in points]
            self.client.log_batch(self.parent_id, metrics=summary)
        inputs = []
        for name, digest, source, context in naming.datasets(self.config, record):
            dataset = Dataset(name, digest[:DIGEST_LENGTH], "r1pipe", source)
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
        self.client.log_inputs(self.run_id, inputs)

    def _describe_pipeline(self) -> None:
        """The table of the pipeline's or sweep's runs as description and as a file, and a current report."""
        record = self.folder.record
        if self.sweep:
            folders = [run.folder for run in results.finished_runs(self.root)]
            of_sweeps = [folder for folder in folders if folder.sweep.exists()]
            names = [one.run_id for one in of_sweeps if one.sweep.read_text(encoding="utf-8") == self.sweep]
            rows, story = results.rows(self.root, names) if names else [], []
        else:
            runs = results.choose(self.root, None, str(self.config["pipeline"]))
            rows, story = [results.row(run) for run in runs], sentences(runs)
        note = naming.description(self.root, rows, story)
        self.client.set_tag(self.parent_id, "mlflow.note.content", note)
        self.client.log_text(self.parent_id, results.as_json(rows), "table.json")
        page = self.root / REPORT
        if page.exists() and record.exists() and page.stat().st_mtime_ns >= record.stat().st_mtime_ns:
            log_report(self.client, self.parent_id, self.root)

    def _register(self, record: Record) -> str:
        """Register the checkpoint as a model version with the stage as alias; the weights are not copied."""
        from mlflow.exceptions import MlflowException

        name, stage = self.config["tracking"]["model_name"], str(record["stage"])
        checkpoint = inside(self.folder.path, record["checkpoint"], self.folder.record)
        for path in (checkpoint / "config.json", checkpoint / "manifest.json"):
            if path.exists():
                self.client.log_artifact(self.run_id, str(path), "checkpoint")
        tags = {"run_id": self.folder.run_id, "run_dir": str(self.folder.path), "checkpoint": str(checkpoint)}
        tags |= {"stage": stage, "created": str(record.get("created")), **naming.provenance(record)}
        version = self._version(name, checkpoint.name, tags)
        try:
            held_since = self.client.get_model_version_by_alias(name, stage).tags.get("created", "")
        except MlflowException:
            held_since = ""  # no version has the alias
        if tags["created"] >= held_since:  # an older run that is logged late must not take it
            self.client.set_registered_model_alias(name, stage, version)
        return f"models:/{name}@{stage}"

    def _version(self, name: str, checkpoint: str, tags: dict[str, str]) -> str:
        """This run's version with its tags updated, or a new one."""
        from mlflow.exceptions import MlflowException

        for existing in self.client.search_model_versions(store.matching("run_id", self.run_id)):
            if existing.name == name:
                for key, value in tags.items() - existing.tags.items():
                    self.client.set_model_version_tag(name, existing.version, key, value)
                return existing.version
        try:
            self.client.create_registered_model(name, description="Checkpoints; an alias for each stage.")
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = self.client.create_model_version(
            name,
            f"runs:/{self.run_id}/checkpoint",  # a server refuses local paths; the tag `checkpoint` has it
            self.run_id,
            tags,
            description=f"{tags['stage']}, {checkpoint} of {tags['run_id']}",
        )
        return version.version
