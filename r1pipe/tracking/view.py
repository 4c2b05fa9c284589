"""The charts that `r1pipe ui` opens with, in the form in which MLflow's UI shares a view: a tag of the
experiment, which an address names by its key."""

import json
from typing import Any

KEY = "r1pipe"
TAG = f"mlflow.sharedViewState.{KEY}"
SECTION = "Reproduction"
SERIES = ("stages/pass_at_1",)  # of the pipeline's run: a point for each stage
BARS = tuple(f"eval/{name}" for name in ("pass_at_1", "level_4", "length_mean", "reflection_rate"))
CURVES = ("rewards/accuracy/mean", "completions/mean_length", "reflection_rate", "entropy")


def shared(search: str) -> str:
    """The view of the runs that a search finds; MLflow adds a chart for every other metric below."""
    of_stages, of_steps = ([chart("LINE", name) | LINE for name in names] for names in (SERIES, CURVES))
    section = {"uuid": SECTION, "name": SECTION, "display": True, "isReordered": True}
    return json.dumps(
        {
            "searchFilter": search,
            "orderByKey": "attributes.end_time",  # by their start, stages hide below the pipeline's run
            "orderByAsc": True,
            "runsHiddenMode": "SHOW_ALL",
            "compareRunCharts": [*of_stages, *(chart("BAR", name) for name in BARS), *of_steps],
            "compareRunSections": [section | {"deleted": False, "isGenerated": False}],
            "isAccordionReordered": True,
        }
    )


LINE = {
    "scaleType": "linear",
    "xAxisKey": "step",
    "yAxisKey": "metric",
    "yAxisExpressions": [],
    "lineSmoothness": 0,
    "useGlobalXaxisKey": True,
    "useGlobalLineSmoothing": True,
}


def chart(kind: str, metric: str) -> dict[str, Any]:
    return {
        "uuid": f"{kind} {metric}",
        "type": kind,
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "metricSectionId": SECTION,
        "runsCountToCompare": 20,
        "deleted": False,
        "isGenerated": False,
    }
