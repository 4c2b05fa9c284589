"""Run folders for jobs that the tests really run: a tiny model on the bundled world."""

import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import forked
import torch
from forked import free_port

from r1pipe.config import EngineConfig, OptimConfig, RouterConfig, RunConfig, to_mapping
from r1pipe.config.compose import compose
from r1pipe.model import DeepseekV3
from r1pipe.runs.files import write_json

TINY = [
    "model.hidden_size=32",
    "model.intermediate_size=48",
    "model.moe_intermediate_size=16",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.kv_lora_rank=16",
    "model.max_position_embeddings=512",
    "engine.ranks=1",
    "engine.threads=1",
    "stage.eval.problems=4",
    "stage.eval.shown=2",
    "stage.eval.samples=1",
    "stage.eval.general=5",
    "stage.eval.max_tokens=8",
]
OPTIM = OptimConfig(1e-2, 1e-3, "linear", 2, [0.9, 0.95], 1e-8, 0.1, 1.0, max_skipped=0)
ROUTER = RouterConfig(bias_rate=0.01, balance_alpha=0.0)


@cache
def tiny(stage: str, *overrides: str) -> RunConfig:
    return compose([f"stage={stage}", *TINY, *overrides]).config


def engine_config(
    ranks: int = 1, zero_level: int = 0, precision: str = "fp32", head: str = "model"
) -> EngineConfig:
    engine = tiny("pretrain").engine
    return replace(engine, ranks=ranks, zero_level=zero_level, precision=precision, head=head)


def tiny_model() -> DeepseekV3:
    return DeepseekV3(tiny("pretrain").model, torch.Generator().manual_seed(0))


def write_run(folder: Path, config: RunConfig) -> Path:
    """A run folder with its config.json, as `r1pipe run` leaves it for the job."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", to_mapping(config))
    return folder


def on_two_ranks(script: str, folder: Path, ranks: int = 2) -> dict:
    """What a script of this folder, run on two ranks or more, writes to found.json in `folder`.

    The ranks are forked from a warm process: no launcher, and no torch that each imports anew.
    """
    with forked.ranks(folder, _run_script, ranks, script) as started:
        ended = forked.codes(started)
    told = "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("out-*.txt")))
    assert ended == [0] * ranks, told
    return json.loads((folder / "found.json").read_text())


def _run_script(folder: Path, script: str) -> None:
    runpy.run_path(str(Path(__file__).with_name(script)), run_name="__main__")


def launched(script: str, folder: Path, ranks: int = 2) -> dict:
    """The same by DeepSpeed's launcher, as jobs of more than one rank start."""
    here = Path(__file__).parent
    port = free_port()
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    environment |= {"PYTHONPATH": f"{here.parent}:{here}", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    launcher = Path(sys.executable).with_name("deepspeed")
    line = [launcher, "--no_local_rank", "--num_accelerators", str(ranks), "--master_port", str(port)]
    done = subprocess.run(
        [*map(str, line), str(here / script), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=3600,  # a busy machine takes minutes to start two ranks
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())
