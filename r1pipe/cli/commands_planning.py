"""The commands on what computing costs: beforehand, and afterwards from run folders."""

import json
from pathlib import Path
from typing import Annotated

import typer

from r1pipe.cli.options import Overrides, composed


def plan(
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="An object with everything, for scripts.")] = False,
    search: Annotated[
        bool, typer.Option("--search", help="The fastest layout that fits, instead of the one given.")
    ] = False,
    what_if: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUES", help="cluster.usd_per_hour=2,3 or layout.mfu=0.3,0.4"),
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with bars, too.")] = None,
    timeline: Annotated[
        str | None, typer.Option(metavar="RUN", help="Show the last step of a run with engine.pipeline.")
    ] = None,
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help="With --timeline: a picture, too.")] = None,
) -> int:
    """Memory, time and cost before anything is spent: plan model=v3 cluster=h800x2048

    With stage=NAME it plans that stage as its engine would run it on all devices of the cluster; without, the
    phases of layout=NAME (conf/plan), by default those of the model's own file. cluster=NAME (conf/cluster),
    layout=NAME and keys below them are this command's own. Exit code 1 if it does not fit.

    With --timeline it shows instead what the ranks of a run's pipeline did in its last saved step.
    """
    if timeline is not None:
        from r1pipe.cli import timelines

        timelines.show(timeline, overrides or [], svg)
        return 0
    from r1pipe.cli import planning as shown
    from r1pipe.config.planning import check_layout
    from r1pipe.plan import planner

    model, cluster, layout, phases = shown.plan_inputs(overrides or [])
    if not search:
        check_layout(layout, cluster, model)
    others = planner.search(model, cluster, layout, phases) if search else []
    chosen = others[0] if search else planner.plan(model, cluster, layout, phases)
    changed = [row for line in what_if or [] for row in shown.what_if(line, overrides or [], chosen.layout)]
    if as_json:
        content = chosen.as_json()
        if search:
            content["layouts_that_fit"] = len(others)
        if what_if:
            content["what_if"] = [
                {"key": key, "value": value, **shown.summary(other)} for key, value, other in changed
            ]
        print(json.dumps(content, indent=2))
    else:
        shown.show(chosen, others, changed)
    if html is not None:
        shown.write_page(chosen, html)
    return 0 if chosen.fits else 1


def cost(
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="An object, for scripts.")] = False,
    usd_per_hour: Annotated[
        float | None, typer.Option(min=0, help="price of a GPU, or of a core where no GPU was used")
    ] = None,
    watts: Annotated[float | None, typer.Option(min=0, help="power of the same")] = None,
) -> None:
    """What all runs of a root took, failed ones too, beside those that made the results: cost root=DIR

    cluster=NAME gives price and power from conf/cluster; runs on other devices have hours, but no price.
    """
    from r1pipe.cli import cost as ledger

    words = overrides or []
    rates = ledger.Rates.of([word for word in words if word.startswith("cluster")], usd_per_hour, watts)
    config = composed([word for word in words if not word.startswith("cluster")])
    found = ledger.ledger(Path(config.root), rates)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        ledger.show(found)
