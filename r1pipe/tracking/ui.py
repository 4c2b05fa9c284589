"""`r1pipe ui`: MLflow's pages of a root's runs."""

import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from r1pipe.config import TrackingConfig
from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.redaction import without_login
from r1pipe.tracking import view
from r1pipe.tracking.naming import PIPELINE
from r1pipe.tracking.store import (
    QUIET,
    artifact_folder,
    check_exists,
    is_server,
    matching,
    prepare,
    store_uri,
)

LOOPBACK = "127.0.0.1"
EVERY_ADDRESS = "0.0.0.0"
LEAVING_S = 10.0  # from SIGTERM to SIGKILL
ANSWER_S = 10.0


def serve_ui(root: Path | str, tracking: TrackingConfig, port: int, host: str = LOOPBACK) -> int:
    """Serve until interrupted, and print the address once it answers; the server's exit code.

    Raises EnvironmentProblem if there is nothing to serve, the store is a server with a UI of its own,
    the port is taken, or the server does not start.
    """
    store = store_uri(root, tracking.uri)
    if is_server(store):
        raise EnvironmentProblem(
            f"tracking.uri is a server with a UI of its own: open {without_login(store)}"
        )
    check_exists(
        store, EnvironmentProblem(f"no MLflow store under {root} yet; `r1pipe reproduce` creates one")
    )
    try:
        socket.create_server((host, port)).close()
    except OSError as error:
        raise EnvironmentProblem(f"{host}:{port}: {error.strerror}; give another --port or --host") from error
    prepare(store)
    if not is_loopback(host):
        print(
            f"warning: anyone who reaches {host}:{port} can read, change and delete all runs: MLflow asks "
            "for no password",
            file=sys.stderr,
        )
    print("starting MLflow's server, which takes about ten seconds", file=sys.stderr, flush=True)
    address = f"http://{LOOPBACK if host == EVERY_ADDRESS else host}:{port}"
    options = ["--host", host, "--port", str(port), "--workers", "1", "--backend-store-uri", store]
    options += ["--default-artifact-root", artifact_folder(root).as_uri()]
    options += ["--uvicorn-opts", "--log-level warning", *allowed(host, port)]
    command = [sys.executable, "-m", "mlflow", "server", *options]
    with tempfile.TemporaryFile("w+") as log, serving(command, log) as process:
        page = None
        while page is None:
            if process.poll() is not None:
                log.seek(0)
                last = log.read().strip().rpartition("\n")[2]
                raise EnvironmentProblem(f"MLflow's server did not start: {last}")
            time.sleep(0.2)
            page = comparison(address, tracking.experiment)
        print(f"MLflow's UI: {page} (Ctrl-C ends it)", flush=True)
        return process.wait()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name
        return False


@contextmanager
def serving(command: list[str], log: IO[str]) -> Iterator[subprocess.Popen]:
    """MLflow's server for the length of a block, after which all its processes have ended."""
    variables = {**QUIET, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **os.environ}
    process = subprocess.Popen(command, env=variables, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(LEAVING_S)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def allowed(host: str, port: int) -> list[str]:
    """Options that let browsers call the server by name: by default it answers to addresses of private
    networks alone, and takes searches, which are POST requests, from pages of localhost alone."""
    if is_loopback(host):
        return []
    names = {socket.gethostname(), "localhost", LOOPBACK, host}
    if host == EVERY_ADDRESS:
        names |= {"192.168.*", "10.*", "172.*"}
    hosts = [f"{name}:{port}" for name in sorted(names)]
    origins = [f"http://{name}" for name in hosts]
    return ["--allowed-hosts", ",".join(hosts), "--cors-allowed-origins", ",".join(origins)]


def comparison(address: str, experiment: str) -> str | None:
    """The page that compares the stages of the newest reproduction, the charts that tell most first; MLflow's
    welcome page where there is no such experiment; None while the server does not answer."""
    name = urllib.parse.quote(experiment)
    try:
        found = asked(address, f"experiments/get-by-name?experiment_name={name}")
    except urllib.error.HTTPError:
        return address
    except OSError:
        return None
    number = found["experiment"]["experiment_id"]
    query = {
        "experiment_ids": [number],
        "filter": f"{matching('tags.`r1pipe.kind`', PIPELINE)} and metrics.`{view.SERIES[0]}` >= 0",
        "order_by": ["attributes.start_time DESC"],
        "max_results": 1,
    }
    charts = f"{address}/#/experiments/{number}/runs?compareRunsMode=CHART"
    runs = asked(address, "runs/search", query).get("runs")
    if not runs:
        return charts
    tags = {tag["key"]: tag["value"] for tag in runs[0]["data"]["tags"]}
    search = matching("tags.`r1pipe.pipeline`", tags["r1pipe.pipeline"])
    told = {"experiment_id": number, "key": view.TAG, "value": view.shared(search)}
    try:
        asked(address, "experiments/set-experiment-tag", told)
    except urllib.error.HTTPError:  # a store that may only be read
        return charts
    return f"{charts}&viewStateShareKey={view.KEY}"


def asked(address: str, call: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The answer of MLflow's REST interface. Raises OSError."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    content = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/api/2.0/mlflow/{call}", content, headers)
    with direct.open(request, timeout=ANSWER_S) as response:
        return json.load(response)
