"""The frame of the report: head, style and the order of its parts."""

from collections.abc import Sequence
from html import escape

from r1pipe.cli.report import sections
from r1pipe.cli.report.load import StageRun
from r1pipe.cli.report.style import STYLE
from r1pipe.core.formatting import duration, percent


def page(runs: Sequence[StageRun], others: Sequence[StageRun]) -> str:
    """The whole page. `runs` in the recipe's order, at least one; `others` count in the cost alone."""
    recipes = list(dict.fromkeys(str((run.config.get("recipe") or {}).get("name") or "") for run in runs))
    title = f"DeepSeek-R1’s recipe, reproduced: {', '.join(filter(None, recipes)) or 'stages'}"
    parts = [
        sections.stages(runs),
        sections.training(runs),
        sections.by_task(runs),
        sections.reward_models(runs),
        sections.samples(runs),
        sections.funnel(runs),
        sections.cost(runs, others),
        sections.lineage(runs),
    ]
    head = (
        f'<meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style>'
    )
    top = f'<h1>{escape(title)}</h1><p class="lead">{_lead(runs)}</p>{_facts(runs)}'
    body = "".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{top}{body}</body></html>\n'


def _lead(runs: Sequence[StageRun]) -> str:
    config = runs[0].config
    model, data = (config.get("model") or {}).get("name"), (config.get("data") or {}).get("name")
    seeds = sorted({run.seed for run in runs})
    text = (
        "A base model is taken through R1’s stages, each a DeepSpeed job that hands its checkpoint to the "
        "next: supervised fine-tuning on a small set of long chains of thought, reinforcement learning on "
        "verifiable problems (GRPO), rejection sampling and supervised fine-tuning from the base again, and "
        "reinforcement learning for all scenarios. Every score is measured on problems that no stage has "
        "trained on. "
    )
    known = [f"model {model}" if model else "", f"data {data}" if data else ""]
    known.append(f"seed{'s' if len(seeds) > 1 else ''} {' and '.join(map(str, seeds))}")
    return text + escape(", ".join(filter(None, known)).capitalize() + ".")


def _facts(runs: Sequence[StageRun]) -> str:
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
    body = "".join(f"<div><dt>{escape(key)}</dt><dd>{escape(fact)}</dd></div>" for key, fact in facts.items())
    return f'<dl class="facts">{body}</dl>'
