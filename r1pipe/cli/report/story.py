"""The top of the report: the curves of reinforcement side by side, one problem answered along the way,
strategies over time, and what more tokens are worth."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, NamedTuple

from r1pipe.cli.report.charts import Curve, areas_panel, curve_panel
from r1pipe.cli.report.load import StageRun
from r1pipe.cli.report.plots import Panel, accuracy_panel, stage_colors
from r1pipe.core.formatting import number, percent
from r1pipe.core.reflection import Correction
from r1pipe.runs.story import REINFORCED, first_seed

Runs = Sequence[StageRun]
BEFORE = ("base", "cold_start")  # what the reinforced model is held against
SHOWN = 6  # answers of one training, the first and the last among them
Part = tuple[str, str]  # "", "wrong" or "right"; a piece of a text


def of_stages(runs: Runs, stages: Iterable[str]) -> list[list[StageRun]]:
    """The runs of each of the stages that has any, a list for each, the first seed first."""
    by_seed = sorted(runs, key=lambda run: run.seed)
    found = [[run for run in by_seed if run.stage == stage] for stage in stages]
    return [seeds for seeds in found if seeds]


# --- charts


def curve_panels(runs: Runs) -> list[Panel]:
    """Accuracy, length, reflection and entropy by step, of every training of REINFORCED; without what was not
    logged."""
    groups, color = of_stages(runs, REINFORCED), stage_colors(runs)

    def curves(metric: str, dashed: bool = False, ending: str = "") -> list[Curve]:
        return [
            Curve(f"{run.stage}{ending}", color.get(run.stage, 0), *run.series(metric), dashed, faint=i > 0)
            for seeds in groups
            for i, run in enumerate(seeds)
            if run.series(metric)[0]
        ]

    beyond = curves("eval/level_4", dashed=True, ending=", level 4")
    held_out = curves("eval/pass_at_1")
    accuracy = [*held_out, *beyond] or curves("rewards/accuracy/mean")
    of_what = "held-out problems" if held_out else "training problems"
    if beyond:
        of_what += "; dashed: level 4, which only the base has read"
    charts = [
        ("Accuracy", "%", accuracy, of_what),
        ("Response length", "tokens", curves("completions/mean_length"), "mean, of training problems"),
        ("Reflection", "%", curves("reflection_rate"), "responses that mend an error of their own"),
        ("Entropy", "nats per token", curves("entropy"), "how open the next token is"),
    ]
    panels = (curve_panel(title, unit, found, note) for title, unit, found, note in charts)
    return [panel for panel in panels if panel is not None]


def strategy_panels(runs: Runs) -> list[Panel]:
    """How the responses went about their problems, by step: shares that add up to 1."""
    first = [seeds[0] for seeds in of_stages(runs, REINFORCED)]
    lines = [line for run in first for line in run.metrics]
    names = {name for line in lines for name in line if name.startswith("strategy/")}
    weight = {name: sum(line.get(name, 0.0) for line in lines) for name in names}
    ordered = sorted(names, key=lambda name: -weight[name])
    panels = []
    for run in first:
        steps = [line["step"] for line in run.metrics if names & line.keys()]
        shares = {
            name.removeprefix("strategy/").replace("_", " "): [
                line.get(name, 0.0) for line in run.metrics if names & line.keys()
            ]
            for name in ordered
        }
        if len(steps) > 1:
            panels.append(areas_panel(f"Strategies while {run.stage} trains", steps, shares))
    return panels


def lengths_panel(runs: Runs) -> Panel | None:
    """pass@1 if a response may have so many tokens: before reinforcement and after."""
    curves, color = [], stage_colors(runs)
    for [run, *_] in of_stages(runs, (*BEFORE, REINFORCED[0])):
        within = run.row["pass_at_1_within"] or {}
        known = sorted((int(tokens), share) for tokens, share in within.items() if share is not None)
        if known:
            tokens, shares = map(list, zip(*known, strict=True))
            curves.append(Curve(run.stage, color[run.stage], tokens, shares))
    return curve_panel("pass@1 by allowed tokens", "%", curves, "longer responses count as wrong", log=True)


def picture(runs: Runs) -> tuple[list[Panel], list[Panel]]:
    """The charts of curves.png, in two rows."""
    stages, lengths = accuracy_panel(runs), lengths_panel(runs)
    titled = replace(stages, title="Accuracy after every stage") if stages else None
    return curve_panels(runs), [one for one in (titled, *strategy_panels(runs)[:1], lengths) if one]


# --- one problem


class Said(NamedTuple):
    """What one checkpoint answered."""

    who: str  # as it is headed
    sample: dict[str, Any]
    note: str  # how many of all development problems that checkpoint solves

    @property
    def parts(self) -> list[Part]:
        return marked(str(self.sample.get("completion") or ""), self.corrections)

    @property
    def corrections(self) -> list[Correction]:
        """As they were found when it was evaluated: a try of Countdown needs the problem to be judged by."""
        return [
            Correction(tuple(wrong), tuple(right)) for wrong, right in self.sample.get("corrections") or ()
        ]

    @property
    def mends(self) -> bool:
        return bool(self.corrections)

    @property
    def is_right(self) -> bool:
        return bool(self.sample.get("correct"))


def marked(text: str, found: Sequence[Correction]) -> list[Part]:
    """The text in pieces: wrong results that are mended later, what mends them, and what lies between."""
    spans = sorted({(*each.wrong, "wrong") for each in found} | {(*each.right, "right") for each in found})
    edges = [(0, 0, ""), *spans, (len(text), len(text), "")]
    parts: list[Part] = []
    for (_, end, _), (start, stop, kind) in pairwise(edges):
        parts += [("", text[end:start]), (kind, text[start:stop])]
    return [(kind, piece) for kind, piece in parts if piece]


def problem(runs: Runs) -> list[Said]:
    """The most telling problem's answers, from the base to the last step; [] if none is known."""
    told = {run.stage: run for run in first_seed(runs)}
    main = next((told[stage] for stage in REINFORCED if stage in told), None)
    if main is None:
        return []
    before = [told[stage] for stage in BEFORE[: 2 if main.stage == "grpo" else 1] if stage in told]
    answers = [*(one for run in before for one in of_stage(run)), *along(main)]
    by_prompt: dict[str, list[Said]] = {}
    for prompt_id, said in answers:
        by_prompt.setdefault(prompt_id, []).append(said)
    most = max(map(len, by_prompt.values()), default=0)
    whole = [found for found in by_prompt.values() if len(found) == most > 1]
    return joined(max(whole, key=telling)) if whole else []


def telling(answers: Sequence[Said]) -> tuple[bool, ...]:
    """Sorts problems: those that the base gets wrong and the last step right, by a correction, come last."""
    first, last = answers[0], answers[-1]
    learned = last.is_right and not first.is_right
    ever = any(one.mends for one in answers)
    english = first.sample.get("language") == "en"
    return learned and last.mends, learned and ever, learned, last.is_right, english


def of_stage(run: StageRun) -> list[tuple[str, Said]]:
    """Each prompt's id, and what the finished stage answered."""
    if run.dev_evaluations:
        last = run.dev_evaluations[-1]
        return [(_id(sample), Said(run.stage, sample, _solved(last))) for sample in last["samples"]]
    return [(_id(sample), Said(run.stage, sample, "")) for sample in run.samples]


def along(run: StageRun) -> list[tuple[str, Said]]:
    """Each prompt's id, and what was answered at steps 0, 10, 20 ...; of an older run, its last answer."""
    lines = run.dev_evaluations
    if not lines:
        return of_stage(run)
    places = sorted({round(i * (len(lines) - 1) / (SHOWN - 1)) for i in range(SHOWN)})
    return [
        (_id(sample), Said(f"{run.stage}, step {line['step']}", sample, _solved(line)))
        for line in (lines[place] for place in places)
        for sample in line["samples"]
    ]


def joined(answers: Sequence[Said]) -> list[Said]:
    """Without repetition: at step 0 the model is that of the stage before, and says the same."""
    found: list[Said] = []
    for one in answers:
        same = bool(found) and found[-1].sample.get("completion") == one.sample.get("completion")
        if same and one.who.endswith("step 0"):
            found[-1] = found[-1]._replace(who=f"{found[-1].who} = {one.who}")
        else:
            found.append(one)
    return found


def _id(sample: dict[str, Any]) -> str:
    return str(sample.get("prompt_id"))


def _solved(line: dict[str, Any]) -> str:
    share = line["metrics"].get("eval/pass_at_1")
    return "" if share is None else f"solves {percent(share)} % of the development problems"


def tokens_of(sample: dict[str, Any]) -> str:
    return f"{number(sample['tokens'])} tokens" if sample.get("tokens") else ""
