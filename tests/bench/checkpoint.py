"""A random model saved, resumed and exported on some ranks: seconds, and the most memory that a rank takes.

    make bench-checkpoint
    make bench-checkpoint ARGS="--parameters 3e9 --trained 0.2 --root DIR engine.moments=bf16"

Needs 16 bytes a trained weight (12 with moments in bfloat16; as much again as 12 or 8 with
engine.async_save=true) and 2 a frozen one, on all ranks together. Training waits in "save: waits". Memory is
a process's own (anonymous) beside what it had before the model.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
from faults.forks import free_port, warm

from r1pipe.config import RunConfig, script_options, to_mapping
from r1pipe.config.compose import compose
from r1pipe.config.script_options import ExportOptions
from r1pipe.core.paths import RunFolder
from r1pipe.plan.sizes import parameters
from r1pipe.runs.files import write_json

SMALL = 5e8  # parameters below which everything is half as wide
NARROW = {"hidden_size": 512, "moe_intermediate_size": 256, "vocab_size": 8192, "kv_lora_rank": 128}
TOKENS = 16  # of a step
MIB = 2**20
Measured = dict[str, tuple[float, float]]  # what -> seconds, MiB


def config_of(arguments: argparse.Namespace) -> RunConfig:
    """Of a run of bench_1b's shape with as many layers as the parameters take."""
    words = ["stage=pretrain", "model=bench_1b", "stage.keep=1", "tracking=none", "engine.precision=bf16"]
    words += [f"engine.ranks={arguments.ranks}", f"engine.zero_level={arguments.zero}", "engine.threads=1"]
    config = compose([*words, *arguments.overrides]).config
    shape: Any = config.model
    shape = replace(shape, **NARROW) if arguments.parameters < SMALL else shape
    two, three = (parameters(replace(shape, num_hidden_layers=layers)) for layers in (2, 3))
    layers = 2 + round((arguments.parameters - two) / (three - two))
    return replace(config, model=replace(shape, num_hidden_layers=layers))


# --- in a rank


def own_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


@contextmanager
def measured(found: Measured, name: str, before: float) -> Iterator[None]:
    """Note a block's seconds, and the most memory beside what there was `before`."""
    most, done, began = [0.0], threading.Event(), time.monotonic()

    def watch() -> None:
        while not done.wait(0.02):
            most[0] = max(most[0], own_mib())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        seconds = time.monotonic() - began
        done.set()
        thread.join()
    found[name] = seconds, most[0] - before


def rank_main(what: str, folder: str, rank: int, port: int, arguments: argparse.Namespace) -> None:
    """One rank's process, which saves or resumes; rank 0 writes WHAT.json."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": arguments.ranks, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in places.items()}
    os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1"}
    sys.argv = ["pretrain.py", folder]
    import torch

    from r1pipe.config import PretrainConfig
    from r1pipe.model import DeepseekV3
    from r1pipe.train.engine.engine import Engine
    from r1pipe.train.engine.sharded import new_sharded
    from r1pipe.train.run import open_run

    with open_run(folder, PretrainConfig) as run:
        found: Measured = {}
        before, drawn, config = own_mib(), torch.Generator().manual_seed(0), run.config.engine
        with measured(found, f"{what}: model and engine", before):
            shape: Any = run.config.model
            in_shares = config.zero_level == 3
            model = new_sharded(shape, drawn, config) if in_shares else DeepseekV3(shape, drawn)
            freeze(model, arguments.trained)
            engine = Engine(model, run.stage.optim, run.stage.router, config, 100)

        def step() -> float:
            tokens_BT = torch.arange(TOKENS).unsqueeze(0) + 5
            return engine.train_step([lambda: engine.module(tokens_BT).float().square().mean()]).loss

        if what == "save":
            with measured(found, "save: a step before it", before):
                step()
            run.log(1, {"train/loss": 1.0})
            with measured(found, "save: until it is complete, a step beside it", before):
                with measured(found, "save: waits", before):
                    run.save_checkpoint(engine, 1, {})
                with measured(found, "save: the step beside it", before):
                    loss = step()
                run.saved()
            (Path(folder) / f"loss-{rank}").write_text(repr(loss))
        else:
            with measured(found, "resume: checks and reads", before):
                with measured(found, "resume: checks", before):
                    run.newest_complete(engine)
                engine.load(run.folder.checkpoint(1) / "engine")
            assert repr(step()) == (Path(folder) / f"loss-{rank}").read_text(), "another loss than without"
        told = engine.all_gather_objects(found)
        if rank == 0:
            write_json(Path(folder) / f"{what}.json", told)
        engine.barrier()


def freeze(model: Any, trained: float) -> None:
    """Freeze the first weights, so that so large a share is trained."""
    weights = [*model.parameters()]
    sizes = [getattr(weight, "ds_numel", weight.numel()) for weight in weights]
    left = (1 - trained) * sum(sizes)
    for weight, size in zip(weights, sizes, strict=True):
        weight.requires_grad_(left <= 0)
        left -= size


# --- around them


def on_ranks(what: str, folder: Path, arguments: argparse.Namespace) -> Measured:
    """The worst rank's seconds and memory."""
    port = free_port()
    given = [(what, str(folder), rank, port, arguments) for rank in range(arguments.ranks)]
    ranks = [warm().Process(target=rank_main, args=each) for each in given]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0] * arguments.ranks
    told: list[dict[str, list[float]]] = json.loads((folder / f"{what}.json").read_text())
    worst = {name: [max(values) for values in zip(*(t[name] for t in told), strict=True)] for name in told[0]}
    return {name: (seconds, mib) for name, (seconds, mib) in worst.items()}


def export(folder: Path) -> tuple[float, float]:
    """Seconds, and the most MiB of a process that exports the checkpoint."""
    options = ExportOptions(RunFolder(folder).checkpoint(1), folder / "exported", None, 1.0)
    script_options.write(options, folder / "options.json")
    script = Path(__file__).parents[2] / "stages" / "export.py"
    began, most = time.monotonic(), 0.0
    process = psutil.Popen([sys.executable, str(script), str(folder / "options.json")])
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        own = [int(line.split()[1]) / 1024 for line in status if line.startswith("RssAnon")]
        most = max(most, *own, 0.0)
        time.sleep(0.02)
    assert process.wait() == 0
    return time.monotonic() - began, most


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.checkpoint", description=__doc__)
    parser.add_argument("--parameters", type=float, default=1e8)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--zero", type=int, default=3)
    parser.add_argument("--trained", type=float, default=1.0, help="share of the weights; the rest is frozen")
    parser.add_argument("--root", help="where the run lies meanwhile; default: where temporary files do")
    parser.add_argument("overrides", nargs="*", help="such as engine.moments=bf16 engine.async_save=true")
    arguments = parser.parse_args(words)
    config = config_of(arguments)
    print(
        f"{parameters(config.model) / 1e6:,.0f}M parameters, {arguments.trained:.0%} of them trained, on "
        f"{arguments.ranks} ranks at ZeRO {arguments.zero} {' '.join(arguments.overrides)}\n"
        f"{'':50}{'seconds':>10}{'MiB of a rank':>16}"
    )
    with tempfile.TemporaryDirectory(dir=arguments.root) as place:
        folder = Path(place) / "run"
        folder.mkdir()
        write_json(folder / "config.json", to_mapping(config))
        show(on_ranks("save", folder, arguments))
        saved = RunFolder(folder).checkpoint(1)
        size = sum(path.stat().st_size for path in saved.rglob("*") if path.is_file())
        print(f"the checkpoint has {size / MIB:,.0f} MiB")
        show(on_ranks("resume", folder, arguments))
        show({"export": export(folder)})


def show(rows: Measured) -> None:
    for name, (seconds, mib) in rows.items():
        print(f"{name:50}{seconds:10.1f}{mib:16,.0f}", flush=True)


if __name__ == "__main__":
    from bench.checkpoint import main as here  # ranks find rank_main under this name

    here()
