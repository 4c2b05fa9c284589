"""vLLM as sampler: the server that draws completions, and what must be true of it."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from r1pipe.config.engine import EngineConfig
from r1pipe.config.fields import AboveZero, NonNegative, Positive, Rules, Share, Strict
from r1pipe.core.errors import EnvironmentProblem

ENVIRONMENT = ".venv-vllm"  # beside r1pipe in a checkout; `make vllm` makes it


@dataclass
class SamplerConfig(Strict):
    """The server of engine.sampler=vllm: one that r1pipe starts, or one that runs already."""

    url: str | None  # http://HOST:PORT of a server that runs already; null: r1pipe starts one on this machine
    python: str | None  # of vLLM's environment, for the server that r1pipe starts; null: that of `make vllm`
    args: list[str]  # more of vLLM's own arguments for that server
    gpus: (
        str | None
    )  # its CUDA_VISIBLE_DEVICES; null: the trainer's GPUs, and it sleeps while the trainer works
    gpu_memory_utilization: Share  # share of each of its GPUs' memory that it takes
    cpu_cache_gb: Positive  # its keys and values where it runs on a CPU
    bucket_mb: Positive  # weights gathered and sent at a time
    start_s: AboveZero  # longest start of the server
    timeout_s: AboveZero  # without an answer, or without a new token, after which a server counts as hanging
    wait_s: NonNegative  # how long a server that is gone is waited for before the job saves and ends


def vllm_python(sampler: SamplerConfig) -> Path:
    """Python of vLLM's environment; it may be missing."""
    if sampler.python is not None:
        return Path(sampler.python).expanduser()
    return Path(__file__).parents[2] / ENVIRONMENT / "bin" / "python"


def sampler_rules(sampler: SamplerConfig, engine: EngineConfig) -> Rules:
    """What only one of the two kinds of server takes, and whether there can be one."""
    used = engine.sampler == "vllm"
    if sampler.url is not None:
        yield from _url_rules(sampler)
        if not used:
            yield "sampler.url names a vLLM server; say engine.sampler=vllm to sample from it"
    elif used and engine.launcher != "local":
        yield (
            "engine.sampler=vllm on several machines needs sampler.url=http://HOST:PORT of "
            "a server that all of them reach"
        )


def check_vllm(sampler: SamplerConfig, engine: EngineConfig) -> None:
    """Raises EnvironmentProblem where r1pipe is to start a server, and vLLM is not installed."""
    python = vllm_python(sampler)
    if engine.sampler == "vllm" and sampler.url is None and not python.is_file():
        raise EnvironmentProblem(
            f"engine.sampler=vllm needs vLLM in an environment of its own, but {python} is missing; run "
            "`make vllm` in r1pipe's checkout, or give sampler.python=FILE of an environment with vLLM, or "
            "sampler.url=http://HOST:PORT of a server that runs already"
        )


def _url_rules(sampler: SamplerConfig) -> Rules:
    wrong = f"sampler.url={sampler.url} must be http://HOST:PORT or https://HOST:PORT"
    try:
        parts = urlsplit(sampler.url or "")
        fine = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        fine = False
    if not fine or parts.path.strip("/") or parts.query or parts.fragment:
        yield wrong
    elif parts.username or parts.password:
        yield "sampler.url holds a user or password; set R1PIPE_SAMPLER_TOKEN to the server's key instead"
    for key, given in {"python": sampler.python, "args": sampler.args, "gpus": sampler.gpus}.items():
        if given:
            yield (
                f"sampler.{key} is for the server that r1pipe starts; drop it, or drop "
                f"sampler.url={sampler.url}"
            )
