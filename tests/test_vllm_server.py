"""The vLLM server that r1pipe starts: how, how it ends, and what is refused before."""

import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from fake_vllm import fake_vllm
from fake_vllm_samplers import WORDS, drawn, opened, other_model
from forked import wait_until
from jobs import tiny, tiny_model

from r1pipe.config.compose import compose
from r1pipe.config.sampler import check_vllm
from r1pipe.core.errors import ConfigError, EnvironmentProblem, SamplerLost
from r1pipe.train.rollout import WholeWeights
from r1pipe.train.rollout.vllm.server import WORKER, Served, Server

# In place of vLLM: a server with an engine of its own process, which says what it was started with.
STAND_IN = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(os.environ["TOLD"], "w").write(f"{os.getpid()} {child.pid}")
if "--max-num-seqs" in sys.argv and sys.argv[sys.argv.index("--max-num-seqs") + 1] == "13":
    sys.exit("ValueError: thirteen is too many")
time.sleep(600)
"""


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Python of an environment whose vLLM is STAND_IN."""
    package = tmp_path / "site" / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(STAND_IN)
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{tmp_path}/site" exec {sys.executable} "$@"\n')
    script.chmod(0o755)
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    return script


def server_of(tmp_path: Path, python: Path, **changed: Any) -> Server:
    config = replace(tiny("grpo").sampler, python=str(python), start_s=changed.pop("start_s", 600.0))
    served = Served(
        **{"dtype": "float32", "max_model_len": 384, "max_num_seqs": 8, "on_gpu": False, **changed}
    )
    folder = tempfile.TemporaryDirectory(prefix="r1pipe-vllm-")
    return Server(config, served, folder, tmp_path / "vllm.txt")


def processes(tmp_path: Path) -> list[int]:
    told = tmp_path / "told"
    wait_until(lambda: told.exists() and len(told.read_text().split()) == 2, "its processes' numbers")
    return [int(word) for word in told.read_text().split()]


def gone(pids: list[int]) -> bool:
    return not any(
        psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in pids
    )


def test_a_server_that_does_not_start_says_why(tmp_path: Path, python: Path) -> None:
    server = server_of(tmp_path, python, max_num_seqs=13)
    with pytest.raises(SamplerLost, match=r"vLLM did not start: ValueError: thirteen is too many; see .*txt"):
        server.start(lambda passed, limit: None)
    server.close()
    wait_until(lambda: gone(processes(tmp_path)), "their end")


def test_a_server_that_takes_too_long_is_ended_with_all_its_processes(tmp_path: Path, python: Path) -> None:
    server = server_of(tmp_path, python, start_s=0.6)
    shown: list[tuple[int, int]] = []
    with pytest.raises(SamplerLost, match=r"did not start within sampler.start_s=0.6 seconds; see .*txt"):
        server.start(lambda *passed: shown.append(passed))
    assert shown and not server.alive()
    if (tmp_path / "told").exists():
        wait_until(lambda: gone(processes(tmp_path)), "their end")
    assert not server.alive()


def test_a_server_ends_with_the_job_however_that_ends(tmp_path: Path, python: Path) -> None:
    job = (
        f"import os, subprocess, time; subprocess.Popen(['{python}', '{WORKER}/r1pipe_serve.py', "
        "str(os.getpid())], start_new_session=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", job], env={**os.environ, "PYTHONPATH": str(WORKER)})
    pids = processes(tmp_path)
    assert not gone(pids)
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: gone(pids), "their end")


def test_what_a_server_is_started_with(tmp_path: Path, python: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "29500")
    on_cpu = server_of(tmp_path, python)
    line, variables = " ".join(on_cpu.command()), on_cpu.environment()
    for words in ("--load-format dummy", "--dtype float32", "--enforce-eager", "--no-enable-chunked-prefill"):
        assert words in line
    assert "--enable-sleep-mode" not in line and "MASTER_PORT" not in variables
    assert variables["VLLM_MLA_DISABLE"] == "1" and variables["PYTHONPATH"] == str(WORKER)
    on_gpu = server_of(tmp_path, python, on_gpu=True, experts=True)
    line = " ".join(on_gpu.command())
    for words in ("--enable-sleep-mode", "--gpu-memory-utilization 0.4", "--enable-return-routed-experts"):
        assert words in line
    assert "--enforce-eager" not in line and "CUDA_VISIBLE_DEVICES" not in on_gpu.environment()
    on_gpu.config = replace(on_gpu.config, gpus="4,5", args=["--tensor-parallel-size", "2"])
    line = " ".join(on_gpu.command())
    assert "--enable-sleep-mode" not in line and line.endswith("--tensor-parallel-size 2")
    assert on_gpu.environment()["CUDA_VISIBLE_DEVICES"] == "4,5"


def test_on_the_trainers_gpus_it_sleeps_while_the_trainer_works() -> None:
    with fake_vllm(tiny_model(), WORDS) as fake:
        sampler = opened(fake)
        sampler.update(WholeWeights(other_model()), 0)

        class Here:
            colocated = True

            def alive(self) -> bool:
                return True

        sampler.serving.server, sampler._sleeps = Here(), True  # type: ignore[assignment]
        fake.seen.clear()
        drawn(sampler)
        drawn(sampler)
        sampler.update(WholeWeights(other_model()), 1)
        drawn(sampler)
        order = [path for path in fake.seen if path.startswith(("/sleep", "/wake", "/start", "/inference"))]
        draws = ["/inference/v1/generate"] * 6
        asleep = ["/sleep?level=1", "/wake_up"]
        assert order == [
            *draws,
            *asleep,
            *draws,
            *asleep,
            "/start_weight_update",
            *draws,
            "/sleep?level=1",
        ]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["sampler.url=host:8000"], "sampler.url=host:8000 must be http://HOST:PORT"),
        (["sampler.url=http://host:8000/v1"], "must be http://HOST:PORT"),
        (["sampler.url=http://host:99999"], "must be http://HOST:PORT"),
        (["sampler.url=http://me:secret@host"], "set R1PIPE_SAMPLER_TOKEN to the server's key instead"),
        (
            ["sampler.url=http://host:8000", "sampler.gpus='1'"],
            "sampler.gpus is for the server that r1pipe starts",
        ),
        (["sampler.timeout_s=0"], "sampler.timeout_s=0 must be above 0"),
        (["engine.hostfile=hosts", "engine.launcher=pdsh"], "needs sampler.url=http://HOST:PORT of a server"),
    ],
)
def test_bad_input_gets_one_line(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError) as raised:
        compose(["stage=grpo", "engine.sampler=vllm", *overrides])
    assert told in str(raised.value) and "\n" not in str(raised.value)


def test_a_machine_without_vllm_is_told_how_to_get_it() -> None:
    words = ["stage=grpo", "engine.sampler=vllm", "sampler.python=/nowhere/python"]
    config = compose(words).config
    with pytest.raises(EnvironmentProblem, match=r"/nowhere/python is missing; run `make vllm`"):
        check_vllm(config.sampler, config.engine)
    for more in ("sampler.url=http://host:8000", "engine.sampler=bundled"):
        other = compose([*words[:2], more]).config
        check_vllm(other.sampler, other.engine)


def test_a_server_that_nothing_draws_from_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"say engine\.sampler=vllm to sample from it"):
        compose(["stage=grpo", "sampler.url=http://host:8000"])
