"""The parts of the report: each takes the runs and gives HTML, or nothing where its data is missing."""

import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from r1pipe.cli.report import plots
from r1pipe.cli.report.load import StageRun
from r1pipe.core.formatting import duration, number, percent

Runs = Sequence[StageRun]


def section(title: str, body: str, note: str = "") -> str:
    """A part with its heading; nothing if the body is empty."""
    told = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{told}{body}</section>" if body else ""


def figure(panel: plots.Panel | None) -> str:
    if panel is None:
        return ""
    caption = f"<figcaption>{escape(panel.title)}</figcaption>" if panel.title else ""
    return f'<figure role="img" aria-label="{escape(panel.title)}">{caption}{plots.svg(panel)}</figure>'


def table(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]], css: str = "") -> str:
    """A table; each row is (CSS class, cells). Cells are HTML, the first is the row's head."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(
        f'<tr class="{kind}"><th>{cells[0]}</th>{"".join(f"<td>{cell}</td>" for cell in cells[1:])}</tr>'
        for kind, cells in rows
    )
    whole = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table class="{css}">{whole}</table></div>'


def _class(run: StageRun) -> str:
    return "control" if run.control else ""


# --- stages


def _with_interval(row: dict) -> str:
    ci = row.get("pass_at_1_ci")
    interval = f'<span class="ci">{100 * ci[0]:.1f}–{100 * ci[1]:.1f}</span>' if ci else ""
    return f"<b>{percent(row.get('pass_at_1'))}</b>{interval}"


COLUMNS: dict[str, Callable[[dict], str]] = {
    "seed": lambda row: number(row.get("seed")),
    "pass@1, 95% interval": _with_interval,
    "greedy": lambda row: percent(row.get("greedy")),
    "cons@k": lambda row: percent(row.get("cons_at_k")),
    "format": lambda row: percent(row.get("format_rate")),
    "language": lambda row: percent(row.get("language_consistency")),
    "length": lambda row: number(row.get("length_mean")),
    "cut off": lambda row: percent(row.get("truncation_rate")),
    "general": lambda row: percent(row.get("general_score")),
    "preference": lambda row: percent(row.get("preference_score")),
    "refused": lambda row: percent(row.get("refusal_rate")),
    "answered": lambda row: percent(row.get("safe_answer_rate")),
    "time": lambda row: duration(row.get("wall_s")),
}


def stages(runs: Runs) -> str:
    rows: list[tuple[str, list[str]]] = []
    before: StageRun | None = None
    for run in runs:
        if run.control and not (before and before.control):
            rows.append(("divide", ["controls", *[""] * len(COLUMNS)]))
        name = "" if before and before.stage == run.stage else escape(run.stage)
        rows.append((_class(run), [name, *(value(run.row) for value in COLUMNS.values())]))
        before = run
    note = (
        "Shares in %, length in tokens. <b>pass@1</b> is the mean over several samples per held-out problem, "
        "<b>cons@k</b> their majority vote; <b>refused</b> counts unsafe requests, <b>answered</b> safe ones."
    )
    if any((run.config.get("data") or {}).get("kind") == "world" for run in runs):
        note += " <b>General</b> and <b>preference</b> are judged by the bundled world’s hidden truth."
    counts = {(run.row["problems"], run.row["samples"]) for run in runs if run.row.get("samples")}
    if len(counts) == 1:
        problems, samples = counts.pop()
        note += f" {number(samples)} samples of {number(problems)} problems in every row."
    return section("Stages", figure(plots.accuracy_panel(runs)) + table(["stage", *COLUMNS], rows), note)


def by_task(runs: Runs) -> str:
    """Bars by task, by kind of general prompt, and by preference."""
    preference = [run for run in runs if run.row.get("preference_score") is not None]
    for run in preference:
        kinds = ("preference_score", "refusal_rate", "safe_answer_rate")
        run.row["preference"] = {name.removesuffix("_score"): run.row.get(name) for name in kinds}
    parts = [
        plots.bars_panel(runs, "by_task", "Held-out accuracy by task"),
        plots.bars_panel(runs, "by_language", "Held-out accuracy by language"),
        plots.bars_panel(runs, "general_by_kind", "General prompts by kind"),
        plots.bars_panel(preference, "preference", "Preference and safety"),
    ]
    charts = "".join(figure(part) for part in parts)
    keys = _key({stage: color + 1 for stage, color in plots.stage_colors(runs).items()})
    body = f'{keys}<div class="grid two">{charts}</div>' if charts else ""
    return section("By task, language and kind", body, "Mean over seeds; controls in grey.")


def _key(colors: dict[str, int]) -> str:
    """Which colour of the page means what."""
    chips = (f'<span><i class="p{n}"></i>{escape(name)}</span>' for name, n in colors.items())
    return f'<p class="key">{"".join(chips)}</p>'


def reward_models(runs: Runs) -> str:
    """How well each reward model judges pairs and labels that it has not seen."""
    judged = []
    for run in runs:
        models = (run.record.get("metrics") or {}).get("reward_models") or {}
        judged += [(run, name, measures) for name, measures in models.items()]
    heads = list(dict.fromkeys(measure for _, _, measures in judged for measure in measures))
    rows = [
        (_class(run), [escape(name), str(run.seed), *(number(measures.get(head)) for head in heads)])
        for run, name, measures in judged
    ]
    note = "On held-out pairs and labels; a correlation with length warns of a model that pays for words."
    for run in runs:
        if forced := run.row.get("forced_judges"):
            used = escape(f"{run.stage}, seed {run.seed}: {'; '.join(forced)}")
            note += f" <b>Weak ones were used because it was asked for</b> ({used})."
    names = [head.replace("_", " ") for head in heads]
    return section("Reward models", table(["model", "seed", *names], rows) if rows else "", note)


# --- training


def training(runs: Runs) -> str:
    """Curves of every RL stage, the first one open; then the losses of the supervised ones."""
    body = ""
    reinforced = sorted({run.stage: run for run in runs if run.is_rl}, key=lambda stage: stage != "grpo")
    for n, stage in enumerate(reinforced):
        charts = plots.training_panels([run for run in runs if run.stage == stage])
        grid = f'<div class="grid">{"".join(figure(chart) for chart in charts)}</div>'
        body += f"<details{'' if n else ' open'}><summary>{escape(stage)}</summary>{grid}</details>"
    losses = "".join(figure(chart) for chart in plots.loss_panels(runs))
    if losses:
        body += f'<details><summary>supervised stages</summary><div class="grid">{losses}</div></details>'
    return section("Training", body, "By step; the fainter lines are the other seeds.")


# --- samples


def samples(runs: Runs) -> str:
    """The same prompts, answered after every stage (first seed)."""
    seed = min((run.seed for run in runs if run.samples), default=0)
    told = [run for run in runs if run.seed == seed and run.samples]
    prompts = {one.get("prompt_id"): one for run in told for one in run.samples}
    body = ""
    for n, (prompt_id, prompt) in enumerate(prompts.items()):
        cells = ""
        for run in told:
            found = next((one for one in run.samples if one.get("prompt_id") == prompt_id), None)
            cells += f'<article class="{_class(run)}"><h3>{escape(run.stage)}'
            cells += f"{_badge(found)}</h3>{_response(found)}</article>"
        answer = (
            f' <span class="ci">answer: {escape(str(prompt["answer"]))}</span>'
            if prompt.get("answer")
            else ""
        )
        kind = " ".join(str(prompt.get(name) or "") for name in ("task", "language"))
        asked = f"<em>{escape(kind)}</em> {escape(str(prompt.get('question', '')))}{answer}"
        is_open = "" if n else " open"
        body += f'<details{is_open}><summary>{asked}</summary><div class="samples">{cells}</div></details>'
    return section("The same prompt after every stage", body, "Reasoning in grey, the summary below it.")


def _badge(sample: dict | None) -> str:
    if sample is None or (sample.get("correct") is None and not sample.get("truncated")):
        return ""
    word = "cut" if sample.get("truncated") else "right" if sample["correct"] else "wrong"
    return f'<span class="badge {word}">{word}</span>'


def _response(sample: dict | None) -> str:
    """The completion with its reasoning set apart; tags are shown, for the format is learned too."""
    if sample is None:
        return "<pre>-</pre>"
    parts = re.split(r"(?<=</think>)", str(sample.get("completion", "")), maxsplit=1)
    if len(parts) == 1 and not parts[0].startswith("<think>"):
        return f"<pre>{escape(parts[0])}</pre>"
    thought = f'<span class="thought">{escape(parts[0].strip())}</span>'
    return f"<pre>{thought}{escape(parts[1]) if len(parts) == 2 else ''}</pre>"


# --- rejection sampling


def funnel(runs: Runs) -> str:
    body = ""
    for run in (run for run in runs if run.funnel):
        first = run.funnel[0]
        whole = max(1, (first.get("kept") or 0) + (first.get("dropped") or 0))
        rows = ""
        for step in run.funnel:
            kept, dropped = step.get("kept") or 0, step.get("dropped") or 0
            rows += (
                f'<div class="step"><span>{escape(str(step.get("name", "")))}</span>'
                f'<span class="bar"><i class="p1" style="width:{100 * kept / whole:.1f}%"></i></span>'
                f"<span>{kept:,} kept</span><span>{dropped:,} dropped</span></div>{_examples(step)}"
            )
        body += f"<h3>{escape(run.stage)}, seed {run.seed}: {whole:,} responses sampled</h3>{rows}"
    return section("What rejection sampling kept", body)


def _examples(step: dict) -> str:
    examples = step.get("examples") or []
    if not examples:
        return ""
    shown = "".join(f"<pre>{escape(_plain(example))}</pre>" for example in examples)
    return f"<details><summary>dropped, for example</summary>{shown}</details>"


def _plain(example: Any) -> str:
    return (
        "\n".join(f"{key}: {value}" for key, value in example.items())
        if isinstance(example, dict)
        else str(example)
    )


# --- cost and lineage


def cost(runs: Runs, others: Runs) -> str:
    longest = max(run.wall_s for run in runs) or 1.0
    phases = list(dict.fromkeys(name for run in runs for name in run.record.get("seconds") or {}))
    colors = {name: n % 8 + 1 for n, name in enumerate(phases)}
    rows = []
    for run in runs:
        seconds = run.record.get("seconds") or {}
        parts = "".join(
            f'<i class="p{colors[name]}" style="width:{100 * value / longest:.2f}%"></i>'
            for name, value in seconds.items()
        )
        words = ", ".join(f"{escape(name)} {duration(value)}" for name, value in seconds.items())
        bar = f'<div class="bar" title="{words}">{parts}</div><span class="ci">{words}</span>'
        cells = [escape(run.stage), str(run.seed), duration(run.wall_s), f"{run.cost:.3f}", bar]
        rows.append((_class(run), cells))
    for name, group in (("the recipe", [run for run in runs if not run.control]), ("with controls", runs)):
        total = duration(sum(run.wall_s for run in group))
        rows.append(("total", [name, "", total, f"{sum(run.cost for run in group):.3f}", ""]))
    note = "Wall time from the start of each job to its record, imports and evaluation included."
    if others:
        spent = f"{sum(run.cost for run in others):.3f} {others[0].unit}"
        note += f" Other runs in the same folder (interrupted, tried, made again): {len(others)}, {spent}."
    heads = ["stage", "seed", "time", runs[0].unit, "by phase"]
    return section("Time and cost", _key(colors) + table(heads, rows, "last-left"), note)


def lineage(runs: Runs) -> str:
    rows = []
    for run in runs:
        parents, code = run.record.get("parents") or {}, run.record.get("code") or {}
        cells = [
            escape(run.folder.run_id),
            _parents([parents["weights"]] if parents.get("weights") else []) or "random weights",
            _parents(parents.get("data") or []) or "-",
            *(_hash(run.record.get(name)) for name in ("config_hash", "data_hash", "checkpoint_hash")),
            _hash(code.get("revision")) + (" with changes" if code.get("dirty") else ""),
        ]
        rows.append((_class(run), cells))
    heads = ["run", "weights from", "data from", "config", "data", "checkpoint", "code"]
    folders = dict.fromkeys(str(run.folder.path.resolve().parent) for run in runs)
    places = ", ".join(f"<code>{escape(folder)}</code>" for folder in folders)
    note = (
        "R1’s third stage starts from the base again: its edge from the reinforced model is one of data. "
        f"Each run has a folder of its name in {places}; a hash in full under the pointer."
    )
    return section("Lineage", table(heads, rows, "left"), note)


def _parents(references: Sequence[dict]) -> str:
    return "<br>".join(f"{escape(str(one.get('run_id')))} {_hash(one.get('hash'))}" for one in references)


def _hash(value: Any) -> str:
    return f'<code title="{escape(str(value))}">{escape(str(value)[:8])}</code>' if value else "-"
