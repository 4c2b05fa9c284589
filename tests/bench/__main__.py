"""`PYTHONPATH=tests:. python -m bench cpu|gpu|tiny|products`: measures, shows progress, prints the tables."""

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console, RenderableType

from bench.config import (
    BenchConfig,
    Case,
    FP8Step,
    Job,
    Setting,
    Shape,
    gpu_name,
    load_bench,
    of_model,
    rehearsal,
)
from bench.referee import Result, contest, fastest, running
from bench.tables import Row, data_sheet, fp8_table, rows_of, table_of, words
from r1pipe.config import ModelConfig
from r1pipe.core.errors import EnvironmentProblem, R1pipeError

BUSY = 0.5  # load average above which a warning is due
MATMUL = Case("matmul", [], 1, 1, 1, 0, [], {}, {})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a bench; 0, or 2 with one line where it cannot run."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("name", help="a file in conf/bench/")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="instead of the file's")
    parser.add_argument("--model", help="a file in conf/model/, instead of every case's; not for products")
    parser.add_argument("--rehearse", action="store_true", help="try every setting at sizes of no meaning")
    parser.add_argument("--vllm-python", default=".venv-vllm/bin/python", help="left out where it is missing")
    given = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 200)
    try:
        if given.name == "products":
            from bench import products  # imports torch

            products.main(given.device, given.rehearse, console)
            return 0
        config = load_bench(given.name)
        config = replace(config, device=given.device or config.device)
        if given.model:
            config = of_model(config, given.model)
        if given.rehearse:
            config = rehearsal(config)
        Bench(config, given.vllm_python, console).run()
    except R1pipeError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0


class Bench:
    """All cases of one config, one after another."""

    def __init__(self, config: BenchConfig, vllm_python: str, console: Console):
        self.config, self.console = config, console
        self.began = time.monotonic()
        self.pythons = {"vllm": vllm_python}
        self.chosen: dict[tuple[str, str, str], Setting] = {}  # contestant, model, kind of case
        self.installed = {
            "transformers": importlib.util.find_spec("transformers") is not None,
            "trl": importlib.util.find_spec("trl") is not None,
            "vllm": Path(vllm_python).exists(),
        }

    def run(self) -> list[Row]:
        """Measure everything and print the table. Raises EnvironmentProblem where nothing can be measured."""
        models = dict.fromkeys(model for case in self.config.cases for model in case.models)
        shapes = {model: self.config.shape(model) for model in models}  # a wrong name is told at once
        sheet = data_sheet(gpu_name()) if self.config.device == "cuda" else {}
        peers = {peer for case in self.config.cases for peer in case.peers}
        for peer in sorted(peer for peer in peers if not self.installed[peer]):
            self.say(f"{peer} is not installed: left out")
        if self.config.device == "cpu" and (load := os.getloadavg()[0]) > BUSY:
            self.say(f"the machine is busy (load {load:.1f}): others' work is in the figures")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            peaks, bandwidth = self.peaks(folder), self.bandwidth(folder)
            rows: list[Row] = []
            tables: list[RenderableType] = []
            for model, shape in shapes.items():
                weights = folder / model
                make_weights(shape, weights)
                for case in self.config.cases:
                    if model in case.models:
                        results = self.case(case, model, weights, folder)
                        rows += rows_of(results, shape, peaks, bandwidth, sheet)
                if self.config.fp8 and model in self.config.fp8.case.models:
                    tables += self.fp8_step(self.config.fp8, model, weights, folder)
        for table in [table_of(rows, self.config.threads, peaks, bandwidth), *tables]:
            self.console.print(table)
        self.say("done")
        return rows

    def say(self, text: str) -> None:
        self.console.print(f"{time.monotonic() - self.began:4.0f} s  {text}", highlight=False, soft_wrap=True)

    def job(self, contestant: str, case: Case, model: str, weights: Path, setting: Setting) -> Job:
        return Job(
            contestant,
            case,
            model,
            self.config.shape(model).vocab_size,
            str(weights),
            setting,
            self.config.device,
            self.config.threads,
        )

    def peaks(self, folder: Path) -> dict[str, float]:
        """Operations per second of a large matmul in each dtype that a contestant may use."""
        side, peaks = self.config.matmul, {}
        for dtype in sorted(
            {s.dtype for settings in self.config.settings.values() for s in settings} - {"fp8"}
        ):
            peaks[dtype] = 2 * side**3 / self.quickest_turn("matmul", side, dtype, folder)
        return peaks

    def bandwidth(self, folder: Path) -> float:
        """Bytes per second that memory reads and writes in a copy that no cache holds."""
        return 2 * self.config.copied / self.quickest_turn("copy", self.config.copied, "fp32", folder)

    def quickest_turn(self, name: str, size: int, dtype: str, folder: Path) -> float:
        """Seconds of the quickest of five turns."""
        setting, config = Setting(dtype, {}), self.config
        case = replace(MATMUL, kind=name, prompt=size)
        job = Job(name, case, "", 0, "", setting, config.device, config.threads)
        with running(job, folder, {}) as contestant:
            return min(contestant.turn() for _ in range(5))

    def case(self, case: Case, model: str, weights: Path, folder: Path) -> list[Result]:
        """Every contestant at its fastest setting; one that cannot run is left out, with its reason."""
        jobs = []
        for name in ["ours", *(peer for peer in case.peers if self.installed[peer])]:
            try:
                chosen = self.quickest(name, case, model, weights, folder)
            except EnvironmentProblem as error:
                if name == "ours":
                    raise
                self.say(f"{model}, {words(case)}: {error}; left out")
                continue
            jobs.append(self.job(name, case, model, weights, chosen))
        return contest(jobs, self.config.rounds, folder, self.pythons)

    def fp8_step(self, step: FP8Step, model: str, weights: Path, folder: Path) -> list[RenderableType]:
        """Steps in FP8 and in BF16, each at its fastest setting: their table; none where FP8 cannot run."""
        try:
            names = ("ours", "ours_fp8")
            chosen = {name: self.quickest(name, step.case, model, weights, folder) for name in names}
            jobs = [self.job(name, step.case, model, weights, chosen[name]) for name in names]
            self.say(f"{model}, {words(step.case)}: {step.steps} steps in BF16 and in FP8, in turn")
            return fp8_table(step, *contest(jobs, step.steps, folder, self.pythons))
        except EnvironmentProblem as error:
            self.say(f"{model}, {words(step.case)} in FP8: {error}; left out")
            return []

    def quickest(self, name: str, case: Case, model: str, weights: Path, folder: Path) -> Setting:
        """The contestant's fastest setting; prints what each took. Raises EnvironmentProblem if none runs."""
        settings = self.config.settings_of(name, case.kind, model)
        if len(settings) == 1:
            return settings[0]
        known = name, model, case.kind
        if known in self.chosen and case.kind == "train":  # FP8's steps are as large as the case before
            return self.chosen[known]
        tried = [self.job(name, case, model, weights, setting) for setting in settings]
        chosen, times = fastest(tried, folder, self.pythons)
        for setting, took in times.items():
            took = took if isinstance(took, str) else f"{took:.2f} s"
            self.say(f"{model}, {words(case)}, {name}, {setting}: {took}")
        self.chosen[known] = chosen
        return chosen


def make_weights(shape: Shape, folder: Path) -> None:
    """Random weights in the published format, the same for every contestant."""
    if isinstance(shape, ModelConfig):
        from r1pipe.model import DeepseekV3, save_pretrained

        save_pretrained(DeepseekV3(shape), folder)
        return
    from transformers import LlamaConfig, LlamaForCausalLM

    numbers = {name: value for name, value in asdict(shape).items() if name not in ("name", "rope_theta")}
    rope = {"rope_type": "default", "rope_theta": shape.rope_theta}
    LlamaForCausalLM(LlamaConfig(**numbers, rope_parameters=rope)).save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
