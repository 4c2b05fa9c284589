"""A real MLflow server that can be killed and started again on the same store, and what a store shows."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from r1pipe.tracking.store import QUIET, connect

PATIENCE_S = 1800.0  # until it answers, on however busy a machine


def eventually(holds: Callable[[], bool]) -> None:
    """Wait for what a mirror's thread does at its own pace."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


class Server:
    """`mlflow server` on a free port of this machine; its store and artifacts lie in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen | None = None

    def start(self) -> "Server":
        line = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        line += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        line += ["--artifacts-destination", str(self.folder / "artifacts")]
        settings = {**os.environ, **QUIET, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                line, env=settings, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + PATIENCE_S
        while not self.answers():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log()
            time.sleep(0.1)
        return self

    def answers(self) -> bool:
        try:
            urlopen(f"{self.uri}/health", timeout=60).close()
        except (URLError, OSError):
            return False
        return True

    def log(self) -> str:
        return (self.folder / "server.log").read_text(errors="replace")[-2000:]

    def kill(self) -> None:
        """kill -9, all of it."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def view(uri: str) -> dict:
    """All that a store shows of r1pipe's runs, without its own ids and clock: two stores can be compared.

    A point of a metric is (step, value, milliseconds since its run began).
    """
    client = connect(uri)
    runs, named = [], {}
    for experiment in client.search_experiments():
        runs += client.search_runs([experiment.experiment_id], max_results=1000)
    for run in runs:
        tags = run.data.tags
        named[run.info.run_id] = tags.get("r1pipe.run_id") or f"pipeline {tags.get('r1pipe.pipeline')}"
    shown = {"runs": {}, "models": {}}
    for run in runs:
        tags = {
            key: value for key, value in run.data.tags.items() if key.startswith(("r1pipe.", "tripwire."))
        }
        parent = run.data.tags.get("mlflow.parentRunId")
        begins = run.info.start_time
        points = {
            name: sorted(
                (point.step, point.value, point.timestamp - begins)
                for point in client.get_metric_history(run.info.run_id, name)
            )
            for name in run.data.metrics
        }
        if parent is None:  # a pipeline's metrics stand at the stages' own times
            points = {name: [point[:2] for point in found] for name, found in points.items()}
        shown["runs"].setdefault(named[run.info.run_id], []).append(
            {
                "name": run.info.run_name,
                "status": run.info.status,
                "tags": tags,
                "parent": named.get(parent),
                "params": run.data.params,
                "points": points,
                "inputs": sorted(
                    (one.dataset.name, one.dataset.digest, one.dataset.source)
                    for one in run.inputs.dataset_inputs
                ),
                "files": sorted(file.path for file in client.list_artifacts(run.info.run_id)),
            }
        )
    for model in client.search_registered_models():
        made = client.search_model_versions(f"name='{model.name}'")
        versions = {str(version.version): version for version in made}
        shown["models"][model.name] = {
            "versions": sorted(
                (named.get(version.run_id, "?"), sorted(version.tags.items()))
                for version in versions.values()
            ),
            "aliases": {
                alias: named.get(versions[str(number)].run_id, "?") for alias, number in model.aliases.items()
            },
        }
    return shown


def twice(shown: dict) -> list[str]:
    """What stands in a view more than once."""
    found = [name for name, runs in shown["runs"].items() if len(runs) > 1]
    for model in shown["models"].values():
        made_by = [name for name, _ in model["versions"]]
        found += [f"version of {name}" for name in set(made_by) if made_by.count(name) > 1]
    parents = {run["parent"] for [run, *_] in shown["runs"].values()}
    stages = Counter((run["parent"], run["tags"].get("r1pipe.stage")) for [run, *_] in shown["runs"].values())
    for name, runs in shown["runs"].items():
        # a stage that was run again has a point of its own in the pipeline's run
        most = max(count for (parent, _), count in stages.items() if parent == name) if name in parents else 1
        for run in runs:
            for metric, points in run["points"].items():
                steps = Counter(point[0] for point in points)
                found += [f"{name} {metric}"] if steps and max(steps.values()) > most else []
            found += [f"{name} inputs"] if len(run["inputs"]) > len(set(run["inputs"])) else []
    return found
