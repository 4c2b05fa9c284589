"""What the report says, made of the runs; templates/report.html says how it looks."""

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from r1pipe.cli.report import plots, published, story
from r1pipe.cli.report.load import StageRun, cost
from r1pipe.config.changes import decisive
from r1pipe.core.formatting import duration, number, percent
from r1pipe.runs.record import code_version
from r1pipe.runs.story import sentences

Runs = Sequence[StageRun]
MAIN_SETTINGS = (  # the others are in the page, too, but folded
    *("max_steps", "epochs", "demonstrations", "prompts", "samples_per_prompt", "optim.lr", "batch_size"),
    *("sequence_length", "algorithm", "loss", "prompts_per_step", "group_size", "minibatches", "kl_coef"),
    *("clip", "sampling.temperature", "sampling.max_tokens", "eval.problems", "eval.samples"),
    "eval.max_tokens",
)
MODEL_SIZES = {
    "num_hidden_layers": "layers",
    "hidden_size": "wide",
    "n_routed_experts": "routed experts",
    "vocab_size": "tokens in the vocabulary",
}
LOSS = {"train/loss": ""}  # of supervised stages
HEADLINE = {
    "pass_at_1": "pass@1",
    "level_4": "level 4",
    "reflection_rate": "reflection",
    "format_rate": "format",
    "general_score": "general",
}
BARS = {  # key of a row -> title
    "by_task": "Held-out accuracy by task",
    "by_language": "Held-out accuracy by language",
    "general_by_kind": "General prompts by kind",
    "preference": "Preference and safety",
}
SECTIONS = {  # of the page, in order; one without content is left out
    "story": "The story",
    "stages": "Stages",
    "training": "Training",
    "bars": "By task, language and kind",
    "benchmarks": "Benchmarks",
    "reward_models": "Reward models",
    "prompts": "The same prompt after every stage",
    "funnels": "What rejection sampling kept",
    "cost": "Time and cost",
    "making": "How it was made",
    "lineage": "Lineage",
}
ALWAYS = ("stages", "cost", "making", "lineage")
PROMPTS = 12  # of those that were answered after every stage; samples.json has all
SAMPLE_KEYS = ("task", "language", "question", "answer", "completion", "correct", "truncated")


_templates = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_templates.filters |= {"duration": duration, "number": number, "percent": percent}


def render(template: str, **values: Any) -> str:
    """A page; whatever it shows is escaped."""
    return _templates.get_template(template).render(values)


def page(runs: Runs, others: Runs, benchmarks: Mapping[str, Sequence[published.Line]]) -> str:
    """The whole page. `runs` in the recipe's order, at least one; `others` count in the cost alone.

    `benchmarks`: title -> our runs beside the published models.
    """
    recipes = dict.fromkeys(run.recipe.get("name", "") for run in runs)
    phases = dict.fromkeys(
        name for run in runs if run.record is not None for name in run.record.get("seconds") or {}
    )
    parts = {
        "story": tell(runs),
        "training": training(runs),
        "bars": bars(runs),
        "benchmarks": benchmarks,
        "reward_models": [
            (run, kind, measures)
            for run in runs
            for kind, measures in (run.row["reward_models"] or {}).items()
        ],
        "prompts": prompts(runs),
        "funnels": [run for run in runs if run.funnel],
    }
    return render(
        "report.html",
        **parts,
        sections={id_: name for id_, name in SECTIONS.items() if id_ in ALWAYS or parts[id_]},
        tokens_of=story.tokens_of,
        title=f"DeepSeek-R1’s recipe, reproduced: {', '.join(filter(None, recipes)) or 'stages'}",
        runs=runs,
        seeds=sorted({run.seed for run in runs}),
        headline=headline(runs),
        setup=setup(runs),
        settings=settings(runs),
        accuracy=plots.accuracy_panel(runs),
        counts={(run.row["problems"], run.row["samples"]) for run in runs if run.row.get("samples")},
        stage_colors={stage: n + 1 for stage, n in plots.stage_colors(runs).items()},
        published=published.tables(),
        title_of=published.title_of,
        phases={name: n % 8 + 1 for n, name in enumerate(phases)},
        longest=max(run.wall_s for run in runs) or 1.0,
        others=others,
        cost=cost,
        folders=list(dict.fromkeys(str(run.folder.path.resolve().parent) for run in runs)),
        svg=plots.svg,
    )


def tell(runs: Runs) -> dict[str, Any]:
    """The story: sentences, charts and one problem; {} where nothing of it is known."""
    lengths = story.lengths_panel(runs)
    parts = {
        "told": sentences(runs),
        "curves": story.curve_panels(runs),
        "problem": story.problem(runs),
        "others": story.strategy_panels(runs) + ([lengths] if lengths else []),
    }
    return parts if any(parts.values()) else {}


def headline(runs: Runs) -> dict[str, str]:
    """The few numbers that one looks for first: from the first stage to the last one of the recipe."""
    seed = min(run.seed for run in runs)
    recipe = [run for run in runs if run.seed == seed and not run.is_control]
    facts = {"time of the recipe": duration(sum(run.wall_s for run in recipe))}
    measured = [run for run in recipe if run.row["pass_at_1"] is not None]
    if len(measured) > 1:
        first, last = measured[0], measured[-1]
        for key, name in HEADLINE.items():
            if first.row[key] is not None and last.row[key] is not None:
                change = f"{percent(first.row[key])} → {percent(last.row[key])}\u00a0%"
                facts[f"{name}, {first.stage} to {last.stage}"] = change
    return facts


def setup(runs: Runs) -> dict[str, str]:
    """When, on what, and with which code the runs were made; what is not known is left out."""
    days = sorted(run.record["created"][:16].replace("T", " ") for run in runs if run.record)
    facts: dict[str, dict[str, None]] = {}  # what the runs say, each thing once
    if days:
        facts["date"] = {" to ".join(dict.fromkeys([days[0], days[-1]])) + " UTC": None}
    for run in runs:
        for name, text in made_with(run).items():
            facts.setdefault(name, {})[text] = None
    return {name: "; ".join(filter(None, texts)) for name, texts in facts.items() if any(texts)}


def made_with(run: StageRun) -> dict[str, str]:
    """Hardware, engine, model, data and code of one run; "" where it is not known."""
    record: Mapping[str, Any] = run.record or {}
    machine, (count, unit) = run.env.get("machine") or {}, run.devices
    gpus = ", ".join(dict.fromkeys(machine.get("gpus") or []))
    hardware = [f"{count} {unit}{'s' if count != 1 else ''}", gpus, machine.get("system")]
    engine, model, data, tracking = (
        run.config.get(group) or {} for group in ("engine", "model", "data", "tracking")
    )
    parts = [engine.get("precision"), f"ZeRO {engine.get('zero_level')}"]
    sizes = [f"{model[key]} {what}" for key, what in MODEL_SIZES.items() if model.get(key)]
    versions = {"Python": run.env.get("python"), **(record.get("versions") or {})}
    root = run.folder.path.resolve().parent
    store = f"experiment {tracking.get('experiment')} in {tracking.get('uri') or f'{root}/mlflow.db'}"
    ranks = engine.get("ranks")
    return {
        "hardware": ", ".join(filter(None, hardware)),
        "engine": ", ".join(filter(None, [*parts, f"{ranks} ranks a machine"])) if ranks else "",
        "model": f"{model.get('name')}: {', '.join(sizes)}" if sizes else "",
        "data": data.get("name") or "",
        "code": code_version(record, 12),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
        "MLflow": f"{store}; open it with r1pipe ui root={root}" if tracking.get("enabled") else "",
    }


def settings(runs: Runs) -> dict[str, Any]:
    """The stages' hyperparameters: for each key a cell for each stage (its first seed)."""
    first = {run.stage: run for run in reversed(runs)}
    stages = list(dict.fromkeys(run.stage for run in runs))
    values = [decisive({"stage": first[stage].config["stage"]}) for stage in stages]
    keys = list(dict.fromkeys(key for value in values for key in value))
    main = [f"stage.{name}" for name in MAIN_SETTINGS if f"stage.{name}" in keys]
    rest = [key for key in keys if key not in main and key not in ("stage.name", "stage.script")]

    def cells(key: str) -> list[str]:
        return [shown(value[key]) if key in value else "" for value in values]

    def shown(value: Any) -> str:
        return f"{value:g}" if isinstance(value, float) else "-" if value is None else str(value)

    return {
        "stages": stages,
        "main": {key: cells(key) for key in main},
        "rest": {key: cells(key) for key in rest},
    }


# --- charts


def training(runs: Runs) -> dict[str, list[plots.Panel]]:
    """Curves of every RL stage, GRPO's first; then the losses of the supervised ones."""
    of_stage: dict[str, list[StageRun]] = {}
    for run in runs:
        of_stage.setdefault(run.stage, []).append(run)
    charts, losses = {}, []
    for stage in sorted(of_stage, key=lambda stage: stage != "grpo"):
        if any(run.is_rl for run in of_stage[stage]):
            charts[stage] = plots.training_panels(of_stage[stage])
        elif any(run.series("train/loss")[0] for run in of_stage[stage]):
            curves, seen = (
                plots.curves(of_stage[stage], LOSS),
                plots.told(f"{stage}, loss", of_stage[stage], LOSS),
            )
            losses.append(plots.Panel(stage, curves, "loss, nats per token", summary=seen))
    return charts | ({"supervised stages": losses} if losses else {})


def bars(runs: Runs) -> list[plots.Panel]:
    """By task, by kind of general prompt, and by preference."""
    for run in runs:
        if run.row["preference_score"] is not None:
            kinds = ("preference_score", "refusal_rate", "safe_answer_rate")
            run.row["preference"] = {name.removesuffix("_score"): run.row[name] for name in kinds}
    panels = (plots.bars_panel(runs, key, title) for key, title in BARS.items())
    return [panel for panel in panels if panel is not None]


# --- samples


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
        for prompt_id, prompt in islice(known.items(), PROMPTS)
    ]
