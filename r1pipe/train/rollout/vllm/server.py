"""The vLLM server that r1pipe starts where sampler.url is null: on this machine, reached by a socket file.

It serves random weights of the model's shape until the first update. Its log is in the run folder.
"""

import json
import logging
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from r1pipe.config.sampler import SamplerConfig, vllm_python
from r1pipe.core.errors import SamplerLost
from r1pipe.core.launchers import without_place
from r1pipe.runs import heartbeat
from r1pipe.train.rollout.vllm.client import PATIENCE_S, UNIX, Client, Gone

WORKER = Path(__file__).parent / "worker"
POLL_S = 0.5
LEAVING_S = 10.0  # after SIGTERM, before SIGKILL
BATCHED = 8192  # tokens of prompts that a CPU reads together
# vLLM 0.32's CPU kernel turns the queries of DeepSeek models by wrong angles; plain PyTorch is right.
WITHOUT_ROTARY_KERNEL = {"custom_ops": ["all", "-rotary_embedding"]}

log = logging.getLogger("r1pipe")


@dataclass(frozen=True)
class Served:
    """What a server is to serve."""

    dtype: str  # float32 or bfloat16
    max_model_len: int  # tokens of a prompt with its completion
    max_num_seqs: int  # completions drawn at a time, of all ranks
    on_gpu: bool
    experts: bool = False  # completions come with the experts that their tokens went to


@dataclass
class Server:
    """One vLLM server as a child of this process."""

    config: SamplerConfig
    served: Served
    folder: tempfile.TemporaryDirectory[str]  # config.json, this process's own; its socket, too
    log_file: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"{UNIX}{self.folder.name}/vllm.sock"

    @property
    def colocated(self) -> bool:
        """Whether it shares the trainer's GPUs, and sleeps while the trainer works."""
        return self.served.on_gpu and self.config.gpus is None

    def start(self, progress: Callable[[int, int], None]) -> None:
        """Start it, or start it anew, and wait until it answers; `progress` gets seconds and the limit.

        Raises SamplerLost with vLLM's last words.
        """
        self.stop()
        Path(self.url.removeprefix(UNIX)).unlink(missing_ok=True)
        log.info("starts vLLM (%s); its log: %s", vllm_python(self.config), self.log_file)
        with self.log_file.open("ab") as file:
            offset = file.tell()
            self.process = subprocess.Popen(
                self.command(),
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self._wait(progress, offset)

    def _wait(self, progress: Callable[[int, int], None], offset: int) -> None:
        client, began = Client(self.url, PATIENCE_S), time.monotonic()
        while True:
            passed = time.monotonic() - began
            if not self.alive():
                raise SamplerLost(f"vLLM did not start: {self._last_words(offset)}; see {self.log_file}")
            if passed > self.config.start_s:
                self.stop()
                raise SamplerLost(
                    f"vLLM did not start within sampler.start_s={self.config.start_s:g} seconds; see "
                    f"{self.log_file}, or give more"
                )
            with suppress(Gone):
                client.get("/health")
                break
            progress(int(passed), int(self.config.start_s))
            heartbeat.tick()
            time.sleep(POLL_S)
        log.info("vLLM serves after %.0f s", time.monotonic() - began)

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        """End it and all its processes."""
        process, self.process = self.process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(LEAVING_S)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def close(self) -> None:
        self.stop()
        self.folder.cleanup()

    def command(self) -> list[str]:
        served = self.served
        words = [str(vllm_python(self.config)), str(WORKER / "r1pipe_serve.py"), str(os.getpid())]
        words += ["--uds", self.url.removeprefix(UNIX), "--model", self.folder.name, "--skip-tokenizer-init"]
        words += [
            *arguments(served.max_model_len, served.on_gpu),
            "--load-format",
            "dummy",
            "--dtype",
            served.dtype,
        ]
        words += ["--max-model-len", str(served.max_model_len), "--max-num-seqs", str(served.max_num_seqs)]
        if served.on_gpu:
            words += ["--gpu-memory-utilization", f"{self.config.gpu_memory_utilization:g}"]
            words += ["--enable-sleep-mode"] if self.colocated else []
            words += ["--enable-return-routed-experts"] if served.experts else []
        else:
            words += ["--enforce-eager", "--compilation-config", json.dumps(WITHOUT_ROTARY_KERNEL)]
        return words + self.config.args

    def environment(self) -> dict[str, str]:
        mine = {name: value for name, value in without_place(os.environ).items() if name not in NOT_ITS}
        mine |= {
            "PYTHONPATH": str(WORKER),
            "VLLM_SERVER_DEV_MODE": "1",  # the requests that update weights
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        if self.served.on_gpu:
            return mine | ({"CUDA_VISIBLE_DEVICES": self.config.gpus} if self.config.gpus is not None else {})
        return mine | {
            "VLLM_CPU_KVCACHE_SPACE": str(self.config.cpu_cache_gb),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # its own choice leaves every second core idle
            "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
            "OMP_WAIT_POLICY": "passive",  # threads that spin take the cores from the one that they wait for
            "VLLM_MLA_DISABLE": "1",  # its MLA kernels for CPUs take the latent of V3's own size alone
        }

    def _last_words(self, offset: int) -> str:
        with self.log_file.open("rb") as file:
            file.seek(offset)
            lines = file.read().decode("utf-8", "replace").split("\n")
        said = [line.strip() for line in lines if "Error" in line and "Traceback" not in line]
        return (said or [line for line in lines if line.strip()] or ["it said nothing"])[-1][-300:]


NOT_ITS = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "OMP_NUM_THREADS")  # what was set for the trainer


def arguments(longest: int, on_gpu: bool) -> list[str]:
    """What any server must be started with, wherever it runs."""
    words = [
        "--enable-scale-out",  # tokens in, tokens out
        *("--logprobs-mode", "processed_logprobs"),  # those of the distribution that is drawn from
        *("--worker-extension-cls", "r1pipe_vllm.Extension"),
        *("--weight-transfer-config", '{"backend": "r1pipe"}'),
        *("--generation-config", "vllm"),  # nothing but what a request says
    ]
    if on_gpu:
        return words
    # vLLM's CPU engine dies where a prompt of a request with a seed is read in pieces
    return [*words, "--no-enable-chunked-prefill", "--max-num-batched-tokens", str(max(longest, BATCHED))]
