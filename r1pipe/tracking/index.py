"""One run folder written into MLflow. All of it can be done twice: what is there is found, not doubled."""

import os
from pathlib import Path

from r1pipe.cli.compare import read_json
from r1pipe.core.errors import CheckpointError
from r1pipe.core.paths import RunFolder, inside
from r1pipe.runs.jsonl import Tail
from r1pipe.runs.recorded import wrong_type
from r1pipe.tracking import naming
from r1pipe.tracking.store import artifact_folder, connect, is_server, matching

METRICS_PER_BATCH = 1000  # MLflow's limits
PARAMS_PER_BATCH = 100
DIGEST_LENGTH = 36
PIPELINE, STAGE = "pipeline", "stage"  # what the tag r1pipe.kind says of a run
ROLLOUT_BYTES = 256 * 2**20  # the newest rollout files up to this size are copied; all stay in the run folder


class Index:
    """The MLflow run of one run folder, a child of its pipeline's run."""

    def __init__(self, folder: RunFolder, config: dict, uri: str):
        """Finds or creates the runs. Raises EnvironmentProblem or MlflowException."""
        self.folder, self.config = folder, config
        self.client = connect(uri)
        self._uri = uri
        self._tail = Tail(folder.metrics)
        self._unsent: list[tuple[str, float, int, float]] = []  # (name, value, step, seconds)
        self._last_step: dict[str, int] = {}
        self.parent_id, self.run_id = self._open_runs()
        for run_id in (self.parent_id, self.run_id):
            self.client.update_run(run_id, status="RUNNING")
        run = self.client.get_run(self.run_id)
        self._trips = {key: text for key, text in run.data.tags.items() if key.startswith(naming.TRIPWIRE)}
        self._start_ms = run.info.start_time
        for name in run.data.metrics:  # a run that goes on: where each metric stands
            history = self.client.get_metric_history(self.run_id, name)
            self._last_step[name] = max(point.step for point in history)
        if not run.data.params:
            self._log_params()

    def _open_runs(self) -> tuple[str, str]:
        config, run_dir = self.config, self.folder.path
        root = str(run_dir.parent)
        experiment, pipeline, stage = self._experiment(), str(config["pipeline"]), config["stage"]
        parent = self._run(
            experiment,
            pipeline,
            known_by={"r1pipe.launch.pipeline": pipeline, "r1pipe.root": root, "r1pipe.kind": PIPELINE},
            tags={},
        )
        child = self._run(
            experiment,
            f"{stage['name']} seed {config['seed']}",
            known_by={"r1pipe.run_dir": str(run_dir), "r1pipe.kind": STAGE},
            tags={
                "mlflow.parentRunId": parent,
                "mlflow.source.name": f"stages/{stage['script']}",
                "r1pipe.launch.pipeline": pipeline,
                "r1pipe.root": root,
                "r1pipe.run_id": self.folder.run_id,
                "r1pipe.stage": stage["name"],
            },
        )
        return parent, child

    def _experiment(self) -> str:
        name = self.config["tracking"]["experiment"]
        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        artifacts = None if is_server(self._uri) else artifact_folder(self.folder.path.parent).as_uri()
        kind = {
            "mlflow.experimentKind": "custom_model_development"
        }  # or the UI opens it as one of chat traces
        return self.client.create_experiment(name, artifact_location=artifacts, tags=kind)

    def _run(self, experiment: str, name: str, known_by: dict, tags: dict) -> str:
        """The run that carries the tags `known_by`, made with `tags` too if there is none."""
        wanted = " and ".join(matching(f"tags.`{tag}`", value) for tag, value in known_by.items())
        for run in self.client.search_runs([experiment], wanted, max_results=1):
            return run.info.run_id
        began_ms = int(self.folder.config.stat().st_mtime * 1000)
        tags = {**known_by, **tags, "mlflow.user": os.environ.get("USER", "r1pipe")}
        return self.client.create_run(experiment, began_ms, tags, name).info.run_id

    def _log_params(self) -> None:
        from mlflow.entities import Param

        params = [Param(key, value) for key, value in naming.flatten(self.config).items()]
        for start in range(0, len(params), PARAMS_PER_BATCH):
            self.client.log_batch(self.run_id, params=params[start : start + PARAMS_PER_BATCH])

    def send_lines(self) -> None:
        """Brings MLflow up to what the job has written so far."""
        self._send_metrics()
        self._send_trips()

    def _send_trips(self) -> None:
        """A tag for each tripwire in tripwires.jsonl; one that a job which went back cut off goes."""
        trips = naming.trips(Tail(self.folder.tripwires).read())
        for key in self._trips.keys() - trips.keys():
            self.client.delete_tag(self.run_id, key)
            del self._trips[key]
        for key, text in trips.items():
            if self._trips.get(key) != text:
                self.client.set_tag(self.run_id, key, text)
                self._trips[key] = text

    def _send_metrics(self) -> None:
        """Logs what metrics.jsonl has gained; steps that a metric has (the job went back) are left out."""
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

    def end(self) -> str | None:
        """Logs what the job left; the registered model's address. Without a record the run has failed."""
        record, address, ended_ms = read_json(self.folder.record), None, None
        if wrong_type(record):
            raise CheckpointError(
                f"{self.folder.record}: {wrong_type(record)} is of a wrong type; not tracked"
            )
        self._log_files()
        if record:
            ended_ms = int(self.folder.record.stat().st_mtime * 1000)
            self._log_record(record, ended_ms)
            self._log_inputs(record)
            address = self._register(record) if record.get("checkpoint") else None
        for run_id in (self.run_id, self.parent_id):
            self.client.set_terminated(run_id, "FINISHED" if record else "FAILED", ended_ms)
        return address

    def _log_files(self) -> None:
        folder = self.folder
        named = (folder.config, folder.env, folder.command, folder.evaluation, folder.samples, folder.record)
        for path in (*named, folder.data / "funnel.json", folder.error):
            if path.exists():
                self.client.log_artifact(self.run_id, str(path))
        room = ROLLOUT_BYTES
        for path in sorted(folder.rollouts.glob("*"), key=lambda file: file.stat().st_mtime, reverse=True):
            room -= path.stat().st_size
            if room >= 0:
                self.client.log_artifact(self.run_id, str(path), "rollouts")

    def _log_record(self, record: dict, ended_ms: int) -> None:
        """The final metrics, one value each, and on the pipeline's run at the stage's place in the recipe.

        They stand at step 0: MLflow's UI draws such metrics as bars, run beside run. Logged again they
        are the same rows of its table, so nothing doubles.
        """
        from mlflow.entities import Metric, RunTag

        final = naming.final_metrics(record)
        self.client.log_batch(
            self.run_id,
            metrics=[Metric(name, value, ended_ms, 0) for name, value in final.items()],
            tags=[RunTag(f"r1pipe.{name}", value) for name, value in naming.provenance(record).items()],
        )
        stages = self.config["recipe"]["stages"]
        if record["stage"] in stages:
            place = stages.index(record["stage"])
            summary = [
                Metric(naming.of_stages(name), value, ended_ms, place) for name, value in final.items()
            ]
            self.client.log_batch(self.parent_id, metrics=summary)

    def _log_inputs(self, record: dict) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = []
        for name, digest, source, context in naming.datasets(self.config, record):
            dataset = Dataset(name, digest[:DIGEST_LENGTH], "r1pipe", source)
            inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", context)]))
        self.client.log_inputs(self.run_id, inputs)

    def _register(self, record: dict) -> str:
        """The checkpoint as a model version with the stage as alias; its weights stay in the run folder."""
        name, stage = self.config["tracking"]["model_name"], str(record["stage"])
        checkpoint = inside(self.folder.path, record["checkpoint"], self.folder.record)
        for path in (checkpoint / "config.json", checkpoint / "manifest.json"):
            if path.exists():
                self.client.log_artifact(self.run_id, str(path), "checkpoint")
        tags = {"run_id": self.folder.run_id, "run_dir": str(self.folder.path), "checkpoint": str(checkpoint)}
        tags |= {"stage": stage, "created": str(record.get("created")), **naming.provenance(record)}
        version = self._version(name, Path(checkpoint).name, tags)
        if self._is_newest(name, stage, tags["created"]):
            self.client.set_registered_model_alias(name, stage, version)
        return f"models:/{name}@{stage}"

    def _is_newest(self, name: str, stage: str, created: str) -> bool:
        """Whether the alias may move to a checkpoint: an older run that comes in late must not take it."""
        from mlflow.exceptions import MlflowException

        try:
            holder = self.client.get_model_version_by_alias(name, stage)
        except MlflowException:
            return True  # nobody has it
        return created >= holder.tags.get("created", "")

    def _version(self, name: str, what: str, tags: dict[str, str]) -> str:
        """The version that this run made, its tags brought up to date; a new one if it has none."""
        from mlflow.exceptions import MlflowException

        known = self.client.search_model_versions(
            f"{matching('name', name)} and {matching('run_id', self.run_id)}"
        )
        if known:
            for key in [key for key, value in tags.items() if known[0].tags.get(key) != value]:
                self.client.set_model_version_tag(name, known[0].version, key, tags[key])
            return known[0].version
        try:
            self.client.create_registered_model(name, description="Checkpoints; an alias for each stage.")
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = (
            f"runs:/{self.run_id}/checkpoint"  # a server refuses local paths; the tag `checkpoint` has it
        )
        made = self.client.create_model_version(
            name, source, self.run_id, tags, description=f"{tags['stage']}, {what} of {tags['run_id']}"
        )
        return made.version
