"""What the report says, made of the runs; templates/report.html says how it looks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from r1pipe.cli.report import plots
from r1pipe.cli.report.html import render
from r1pipe.cli.report.load import StageRun, cost
from r1pipe.config.changes import decisive
from r1pipe.core.formatting import duration, percent

Runs = Sequence[StageRun]
MAIN_SETTINGS = (  # the others are in the page, too, but folded
    *("max_steps", "epochs", "demonstrations", "prompts", "samples_per_prompt", "optim.lr", "batch_size"),
    *("sequence_length", "algorithm", "loss", "prompts_per_step", "group_size", "minibatches", "kl_coef"),
    *("clip", "sampling.temperature", "sampling.max_tokens", "eval.problems", "eval.samples"),
    "eval.max_tokens",
)


def page(runs: Runs, others: Runs) -> str:
    """The whole page. `runs` in the recipe's order, at least one; `others` count in the cost alone."""
    recipes = dict.fromkeys(run.stored.recipe.get("name", "") for run in runs)
    settings = Settings.of(runs)
    return render(
        "report.html",
        title=f"DeepSeek-R1’s recipe, reproduced: {', '.join(filter(None, recipes)) or 'stages'}",
        runs=runs,
        seeds=sorted({run.seed for run in runs}),
        headline=headline(runs),
        setup=setup(runs),
        settings=settings,
        accuracy=plots.accuracy_panel(runs),
        counts={(run.row["problems"], run.row["samples"]) for run in runs if run.row.get("samples")},
        training=training(runs),
        stage_colors={stage: number + 1 for stage, number in plots.stage_colors(runs).items()},
        bars=[panel for panel in bars(runs) if panel],
        reward_models=[
            (run, kind, measures)
            for run in runs
            for kind, measures in (run.row["reward_models"] or {}).items()
        ],
        prompts=prompts(runs),
        funnels=[(run, funnel(run)) for run in runs if run.funnel],
        phases={name: n % 8 + 1 for n, name in enumerate(phases(runs))},
        longest=max(run.wall_s for run in runs) or 1.0,
        others=others,
        cost=cost,
        folders=list(dict.fromkeys(str(run.folder.path.resolve().parent) for run in runs)),
        svg=plots.svg,
        reasoning=reasoning,
    )


def headline(runs: Runs) -> dict[str, str]:
    """The few numbers that one looks for first: from the first stage to the last one of the recipe."""
    seed = min(run.seed for run in runs)
    recipe = [run for run in runs if run.seed == seed and not run.control]
    facts = {"time of the recipe": duration(sum(run.wall_s for run in recipe))}
    measured = [run for run in recipe if run.row["pass_at_1"] is not None]
    if len(measured) > 1:
        first, last = measured[0], measured[-1]
        for key, name in (("pass_at_1", "pass@1"), ("format_rate", "format"), ("general_score", "general")):
            change = f"{percent(first.row[key])} → {percent(last.row[key])} %"
            facts[f"{name}, {first.stage} to {last.stage}"] = change
    return facts


# --- how it was made


def setup(runs: Runs) -> dict[str, str]:
    """When, on what, and with which code the runs were made; what is not known is left out."""
    days = sorted(run.record["created"][:16].replace("T", " ") for run in runs if "created" in run.record)
    facts = {
        "date": " to ".join(dict.fromkeys([days[0], days[-1]])) + " UTC" if days else "",
        "hardware": _each(_hardware(run) for run in runs),
        "engine": _each(_engine(run.config.get("engine") or {}) for run in runs),
        "model": _each(_model(run.config.get("model") or {}) for run in runs),
        "data": _each((run.config.get("data") or {}).get("name") for run in runs),
        "code": _each(_code(run.record.get("code") or {}) for run in runs),
        "versions": _each(_versions(run) for run in runs),
        "MLflow": _each(_mlflow(run) for run in runs),
    }
    return {name: text for name, text in facts.items() if text}


def _each(texts: Iterable[str | None]) -> str:
    """What the runs say, each thing once."""
    return "; ".join(filter(None, dict.fromkeys(texts)))


def _hardware(run: StageRun) -> str:
    machine = run.env.get("machine") or {}
    gpus, (count, unit) = machine.get("gpus") or [], run.devices
    parts = [f"{count} {unit}{'s' if count != 1 else ''}", ", ".join(dict.fromkeys(gpus))]
    return ", ".join(filter(None, [*parts, machine.get("system")]))


def _engine(engine: dict) -> str:
    ranks = engine.get("ranks")
    known = [engine.get("precision"), f"ZeRO {engine.get('zero_level')}", f"{ranks} ranks a machine"]
    return ", ".join(filter(None, known)) if ranks else ""


def _model(model: dict) -> str:
    sizes = [f"{model[key]} {what}" for key, what in MODEL_SIZES.items() if model.get(key)]
    return f"{model.get('name')}: {', '.join(sizes)}" if sizes else ""


MODEL_SIZES = {
    "num_hidden_layers": "layers",
    "hidden_size": "wide",
    "n_routed_experts": "routed experts",
    "vocab_size": "tokens in the vocabulary",
}


def _code(code: dict) -> str:
    revision = code.get("revision")
    return f"{revision[:12]}{' with changes' if code.get('dirty') else ''}" if revision else ""


def _versions(run: StageRun) -> str:
    versions = {"Python": run.env.get("python"), **(run.record.get("versions") or {})}
    return ", ".join(f"{name} {version}" for name, version in versions.items() if version)


def _mlflow(run: StageRun) -> str:
    tracking = run.config.get("tracking") or {}
    if not tracking.get("enabled"):
        return ""
    root = run.folder.path.resolve().parent
    where = tracking.get("uri") or f"{root}/mlflow.db"
    return f"experiment {tracking.get('experiment')} in {where}; open it with r1pipe ui root={root}"


@dataclass
class Settings:
    """The stages' hyperparameters: a row for each key, a column for each stage (its first seed)."""

    stages: list[str] = field(default_factory=list)
    main: dict[str, list[str]] = field(default_factory=dict)  # key -> a cell for each stage
    rest: dict[str, list[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, runs: Runs) -> "Settings":
        first = {run.stage: run for run in reversed(runs)}
        stages = list(dict.fromkeys(run.stage for run in runs))
        values = [decisive({"stage": first[stage].config["stage"]}) for stage in stages]
        keys = list(dict.fromkeys(key for value in values for key in value))
        main = [f"stage.{name}" for name in MAIN_SETTINGS if f"stage.{name}" in keys]
        rest = [key for key in keys if key not in main and key not in ("stage.name", "stage.script")]

        def cells(key: str) -> list[str]:
            return [_shown(value[key]) if key in value else "" for value in values]

        return cls(stages, {key: cells(key) for key in main}, {key: cells(key) for key in rest})


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "-" if value is None else str(value)


# --- charts


def training(runs: Runs) -> dict[str, list[plots.Panel]]:
    """Curves of every RL stage, GRPO's first; then the losses of the supervised ones."""
    stages = sorted({run.stage: run for run in runs if run.is_rl}, key=lambda stage: stage != "grpo")
    charts = {stage: plots.training_panels([run for run in runs if run.stage == stage]) for stage in stages}
    losses = plots.loss_panels(runs)
    return charts | ({"supervised stages": losses} if losses else {})


def bars(runs: Runs) -> list[plots.Panel | None]:
    """By task, by kind of general prompt, and by preference."""
    preference = [run for run in runs if run.row["preference_score"] is not None]
    for run in preference:
        kinds = ("preference_score", "refusal_rate", "safe_answer_rate")
        run.row["preference"] = {name.removesuffix("_score"): run.row[name] for name in kinds}
    return [
        plots.bars_panel(runs, "by_task", "Held-out accuracy by task"),
        plots.bars_panel(runs, "by_language", "Held-out accuracy by language"),
        plots.bars_panel(runs, "general_by_kind", "General prompts by kind"),
        plots.bars_panel(preference, "preference", "Preference and safety"),
    ]


# --- samples and rejection sampling


def prompts(runs: Runs) -> list[tuple[dict, list[tuple[StageRun, dict | None]]]]:
    """The same prompts, each with what every stage (of the first seed) answered."""
    seed = min((run.seed for run in runs if run.samples), default=0)
    answering = [run for run in runs if run.seed == seed and run.samples]
    by_run = [
        {sample.get("prompt_id"): {name: sample.get(name) for name in SAMPLE_KEYS} for sample in run.samples}
        for run in answering
    ]
    known = {prompt_id: sample for samples in by_run for prompt_id, sample in samples.items()}
    return [
        (prompt, [(run, samples.get(prompt_id)) for run, samples in zip(answering, by_run, strict=True)])
        for prompt_id, prompt in known.items()
    ]


SAMPLE_KEYS = ("task", "language", "question", "answer", "completion", "correct", "truncated")


def reasoning(completion: str) -> tuple[str, str]:
    """The reasoning and the rest; tags are shown, for the format is learned too."""
    thought, end, rest = completion.partition("</think>")
    return (f"{thought}{end}".strip(), rest) if end or thought.startswith("<think>") else ("", completion)


@dataclass
class FunnelStep:
    """One filter of rejection sampling."""

    name: str
    kept: int
    dropped: int
    examples: list[str]


def funnel(run: StageRun) -> list[FunnelStep]:
    return [
        FunnelStep(
            str(step.get("name", "")),
            step.get("kept") or 0,
            step.get("dropped") or 0,
            [_example(example) for example in step.get("examples") or []],
        )
        for step in run.funnel
    ]


def _example(example: Any) -> str:
    lines = example.items() if isinstance(example, dict) else ()
    return "\n".join(f"{key}: {value}" for key, value in lines) or str(example)


def phases(runs: Runs) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.record.get("seconds") or {}))
