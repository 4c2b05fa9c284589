"""`r1pipe audit`: a checklist of what should be known of a checkpoint, each item answered from records alone.

The items are in conf/audit/checklist.yaml, and ANSWERS says what answers each.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from r1pipe.cli.audit import making, measuring, training
from r1pipe.cli.audit.subject import Answer, Subject
from r1pipe.config.groups import read
from r1pipe.core.errors import ConfigError, nearest
from r1pipe.launch.panel import mask_controls
from r1pipe.runs.lineage.ancestors import Ancestor

CHECKLIST = "audit/checklist"  # in conf/
COLOURS = {"answered": "green", "missing": "red", "not applicable": "dim"}

ANSWERS: dict[str, Callable[[Subject], Answer]] = {
    "lineage": making.lineage,
    "code": making.code,
    "seeds": making.seeds,
    "scheduler": making.scheduler,
    "data_sources": training.data_sources,
    "licences": training.licences,
    "data_samples": training.data_samples,
    "collection": training.collection,
    "teachers_and_judges": training.teachers_and_judges,
    "reward_models": measuring.reward_models,
    "evaluation": measuring.evaluation,
    "helpfulness": measuring.helpfulness,
    "harmlessness": measuring.harmlessness,
    "contamination": measuring.contamination,
    "self_identification": lambda subject: training.screened(subject, "claims"),
    "identity": measuring.identity,
    "personal_data": lambda subject: training.screened(subject, "personal"),
    "cost": making.cost_of,
    "machine": making.machine,
}


def audit(found: Sequence[Ancestor], checklist: Path | None = None) -> dict[str, Any]:
    """{"checkpoint", "items": [{"name", "question", "required", "status", "lines"}], "missing": [names of the
    required items without an answer]}. Raises ConfigError, CheckpointError."""
    items = read_checklist(checklist)
    subject = Subject(found)
    answers = {name: ANSWERS[name](subject) for name in items}
    return {
        "checkpoint": asdict(found[0].parent),
        "items": [{"name": name, **items[name], **asdict(answers[name])} for name in items],
        "missing": [
            name
            for name, item in items.items()
            if item["required"] and answers[name].status == Answer.MISSING
        ],
    }


def read_checklist(path: Path | None) -> dict[str, dict[str, Any]]:
    """Name -> {"required", "question"}; of conf/ unless another file is given. Raises ConfigError."""
    if path is None:
        return read(CHECKLIST)
    from omegaconf import OmegaConf
    from yaml import YAMLError  # type: ignore[import-untyped]

    try:
        content: Any = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OSError, YAMLError, ValueError) as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"--checklist {path} cannot be read: {said}") from None
    if not isinstance(content, dict) or not content:
        raise ConfigError(f"--checklist {path} must be a mapping {{name: {{required, question}}}}")
    for name, item in content.items():
        if name not in ANSWERS:
            raise ConfigError(f"--checklist {path}: no item is called {name}; {nearest(str(name), ANSWERS)}")
        fine = isinstance(item, dict) and set(item) == {"required", "question"}
        if not fine or not isinstance(item["required"], bool) or not isinstance(item["question"], str):
            raise ConfigError(
                f"--checklist {path}: {name} must have required: true or false, and question: TEXT"
            )
    return content


def show(result: dict[str, Any]) -> None:
    console = Console(highlight=False)
    for item in result["items"]:
        optional = "" if item["required"] else " (optional)"
        state = Text(f"{item['status']}{optional}", COLOURS[item["status"]])
        console.print(Text.assemble((item["question"], "bold"), "  ", state), soft_wrap=True)
        for line in item["lines"]:
            console.print(Text(mask_controls(f"    {line}")), soft_wrap=True)
    missing = result["missing"]
    summary = f"{len(missing)} required items have no answer: {', '.join(missing)}" if missing else "no gap"
    console.print(Text(summary, "red" if missing else "green"))
