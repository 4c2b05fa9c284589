"""A run's evaluation on a task of lm-evaluation-harness: `r1pipe eval CHECKPOINT benchmark=lm_eval/TASK`."""

import hashlib
import json
from typing import Any

from jinja2.exceptions import SecurityError
from jinja2.sandbox import SandboxedEnvironment

from r1pipe.config import EvaluateConfig
from r1pipe.core.errors import ConfigError, DataError, EnvironmentProblem
from r1pipe.core.estimates import Z
from r1pipe.runs import stopping
from r1pipe.runs.files import write_json
from r1pipe.runs.harness_tasks import check_tasks
from r1pipe.runs.record import Metrics
from r1pipe.train import evaluation as evaluate
from r1pipe.train.engine.ranks import Ranks
from r1pipe.train.evaluation import Evaluation
from r1pipe.train.rollout import Weights
from r1pipe.train.run import Run

RESULTS = "lm_eval.json"  # in the run folder: its results with every sample
ACCURACIES = ("exact_match", "acc")  # metrics that are a share of right answers


def find_task(run: Run[EvaluateConfig], task: str) -> Any:
    """lm_eval's TaskManager that knows the task, for measure_task; before weights are loaded, on rank 0.

    Raises EnvironmentProblem where lm_eval is not installed, ConfigError for an unknown task, and DataError
    for tasks in a folder that would run code.
    """
    try:
        from lm_eval.api import metrics, registry
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise EnvironmentProblem(
            f"benchmark=lm_eval/{task} needs lm-evaluation-harness; install it: pip install 'r1pipe[lm-eval]'"
        ) from None
    assert metrics  # whose import has filled the registry
    benchmark = run.config.benchmark
    assert benchmark is not None and benchmark.harness is not None
    harness = benchmark.harness
    check_tasks(benchmark, {*registry.metric_registry})
    manager = TaskManager(include_path=harness.tasks, include_defaults=False)
    if task not in manager.all_tasks:  # to read all of its own takes long
        manager = TaskManager(include_path=harness.tasks)
    if task not in manager.all_tasks:
        raise ConfigError(
            f"benchmark=lm_eval/{task}: lm-evaluation-harness has no such task; its own are listed by "
            "`lm_eval ls tasks`, and benchmark.harness.tasks=FOLDER adds yours"
        )
    if harness.tasks and not harness.trust_code:
        sandbox_templates()
    return manager


def measure_task(
    run: Run[EvaluateConfig], ranks: Ranks, weights: Weights, task: str, manager: Any
) -> tuple[Evaluation, str | None]:
    """The evaluation, and a hash of the task's data and prompts; rank 0 measures, with find_task's `manager`.
    All ranks call.

    pass@1 is the first accuracy that the task has; null without one. Raises Interrupted on a request to stop.
    """
    metrics: Metrics = {
        **evaluate.measure([], [], [], run.stage.eval),
        **evaluate.measure_general([], []),
        "data": task,
        "split": run.stage.eval.split,
        "benchmark": f"lm_eval/{task}",
    }
    found: dict[str, Any] = {}
    with stopping.leaving_early(ranks), weights.gathered() as model:
        if run.rank == 0:
            found = _evaluated(run, model.eval(), task, manager)
    if not found:
        return Evaluation(metrics, [], []), None
    samples = found.pop("samples")
    write_json(run.folder.path / RESULTS, json.loads(json.dumps({**found, "samples": samples}, default=str)))
    scores = {name: _numbers(values) for name, values in found["results"].items()}
    metrics["lm_eval"] = {"results": scores, "versions": found["versions"], "n_shot": found["n-shot"]}
    metrics["problems"] = sum(len(rows) for rows in samples.values())
    metrics.update(_accuracy(scores.get(task, {})))
    hashes = json.dumps(found.get("task_hashes", {}), sort_keys=True)
    shown = [_shown(name, row) for name, rows in samples.items() for row in rows][: run.stage.eval.shown]
    return Evaluation(metrics, shown, []), hashlib.sha256(hashes.encode()).hexdigest()


def _evaluated(run: Run[EvaluateConfig], model: Any, task: str, manager: Any) -> dict[str, Any]:
    """lm_eval's results."""
    from lm_eval import simple_evaluate

    from r1pipe.lm_eval.adapter import Checkpoint

    benchmark, config = run.config.benchmark, run.stage.eval
    assert benchmark is not None and benchmark.harness is not None
    harness, seed = benchmark.harness, run.config.seed
    checkpoint = Checkpoint.of_model(
        run.chat, model, seed, config.max_tokens, harness.think_end_token, config.max_num_seqs
    )
    seeds = dict.fromkeys((f"{kind}random_seed" for kind in ("", "numpy_", "fewshot_")), seed)
    try:
        found = simple_evaluate(
            checkpoint,
            tasks=[task],
            num_fewshot=harness.fewshot,
            limit=config.problems or None,
            apply_chat_template=harness.chat,
            fewshot_as_multiturn=harness.chat,
            task_manager=manager,
            torch_random_seed=seed,
            **seeds,
        )
    except SecurityError as error:
        raise DataError(f"benchmark=lm_eval/{task}: a template reaches outside its row ({error})") from None
    except OSError as error:  # no network, no such file or data set
        raise DataError(f"benchmark=lm_eval/{task}: its data cannot be read ({error})") from None
    assert found is not None, "rank 0 has the results"
    return dict(found)


def sandbox_templates() -> None:
    """Let templates of tasks reach nothing but their own row: lm_eval fills them in without a sandbox."""
    from lm_eval import utils

    own = utils.env
    utils.env = SandboxedEnvironment(
        loader=own.loader, undefined=own.undefined, keep_trailing_newline=own.keep_trailing_newline
    )
    utils.env.filters.update(own.filters)


def _numbers(values: dict[str, Any]) -> dict[str, float | None]:
    """metric,filter -> value; None where lm_eval has none."""
    return {
        key: float(value) if isinstance(value, int | float) else None
        for key, value in values.items()
        if "," in key
    }


def _accuracy(scores: dict[str, float | None]) -> Metrics:
    """pass@1 with its interval, from lm_eval's standard error."""
    for metric in ACCURACIES:
        for key, value in scores.items():
            name, _, by = key.partition(",")
            if name == metric and value is not None:
                error = scores.get(f"{metric}_stderr,{by}")
                interval = (
                    None if error is None else [max(0.0, value - Z * error), min(1.0, value + Z * error)]
                )
                return {"pass_at_1": value, "pass_at_1_ci": interval}
    return {}


def _shown(task: str, row: dict[str, Any]) -> dict[str, Any]:
    """A sample as samples.json has them."""
    first = next(iter(row["arguments"]), ("",))
    correct = next((bool(row[name]) for name in ACCURACIES if name in row), None)
    return {
        "prompt_id": f"{task}-{row['doc_id']}",
        "task": task,
        "language": "",
        "question": str(first[0]),
        "answer": str(row["target"]),
        "completion": str(row["filtered_resps"][0]),
        "correct": correct,
        "truncated": False,
    }
