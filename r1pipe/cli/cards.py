"""A model card and a data card in Hugging Face's format, filled from records alone; what is missing is said.

`r1pipe export` writes them: README.md, which a hub shows as the model's page, and DATA_CARD.md, which is the
README.md that a data set would have.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from r1pipe.cli.audit import ANSWERS, read_checklist
from r1pipe.cli.audit.subject import Answer, Subject, folder_of, record_of
from r1pipe.core.formatting import percent
from r1pipe.core.redaction import without_secrets
from r1pipe.runs import samples
from r1pipe.runs.files import write_text
from r1pipe.runs.lineage import training_data
from r1pipe.runs.lineage.ancestors import Ancestor

MODEL_CARD, DATA_CARD = "README.md", "DATA_CARD.md"
PRIVATE = ("machine",)  # items that a card leaves out
ABOUT_DATA = (
    *("data_sources", "licences", "collection", "teachers_and_judges"),
    *("self_identification", "personal_data", "contamination"),
)
EXAMPLES = 3  # samples that a data card shows
LONGEST = 800  # characters of a text in it
NOT_RECORDED = "*not recorded*"
METRICS = {  # of evaluation.json -> how a model-index calls it
    "pass_at_1": "pass@1",
    "cons_at_k": "cons@k",
    "greedy": "greedy accuracy",
    "general_score": "general answers right",
    "refusal_rate": "harmful requests refused",
    "safe_answer_rate": "harmless requests answered",
}
USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER)
```"""


def write(folder: Path, found: Sequence[Ancestor]) -> None:
    """Both cards into an exported folder. Raises CheckpointError where a record cannot be read."""
    subject = Subject(found)
    answers = {name: ANSWERS[name](subject) for name in read_checklist(None) if name not in PRIVATE}
    root = str(folder_of(subject.own).path.parent)
    for name, card in ((MODEL_CARD, model_card), (DATA_CARD, data_card)):
        text = card(subject, answers).replace(f"{root}/", "").replace(root, "the runs' folder")
        write_text(folder / name, without_secrets(text))


def model_card(subject: Subject, answers: dict[str, Answer]) -> str:
    from huggingface_hub import EvalResult, ModelCardData  # takes a second

    own, metrics = subject.own.parent, subject.metrics
    data = record_of(subject.own).get("data") or {}
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=str(metrics.get("data") or data.get("name") or "unknown"),
            dataset_name=str(metrics.get("data") or data.get("name") or "unknown"),
            dataset_split=metrics.get("split"),
            metric_type=key,
            metric_name=name.replace("k", str(metrics.get("k"))) if name == "cons@k" else name,
            metric_value=metrics[key],
        )
        for key, name in METRICS.items()
        if metrics.get(key) is not None
    ]
    front = ModelCardData(
        **licence_of(subject),
        language=languages(subject),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["r1pipe", "reasoning", *dict.fromkeys(one.parent.stage for one in subject.trained)],
        base_model=base_of(subject),
        datasets=datasets(subject) or None,
        model_name=own.run_id,
        eval_results=results or None,
    )
    rows = [f"| {result.metric_name} | {percent(result.metric_value)}% |" for result in results]
    table = ["| measured | |", "|---|---|", *rows] if rows else [NOT_RECORDED]
    return page(
        front.to_yaml(),
        f"# {own.run_id}",
        f"A checkpoint of stage `{own.stage}` of R1's recipe, made with r1pipe; its manifest's hash is "
        f"`{own.hash}`. Everything below is from the records of its runs, and {DATA_CARD} is on its data.",
        "## Use",
        USE,
        "## Evaluation",
        "\n".join(table),
        *sections(answers, [name for name in answers if name not in ABOUT_DATA]),
    )


def data_card(subject: Subject, answers: dict[str, Answer]) -> str:
    from huggingface_hub import DatasetCardData

    runs = subject.trained_on
    total = sum(run.rows or 0 for run in runs)
    front = DatasetCardData(
        **licence_of(subject),
        language=languages(subject),
        task_categories=["text-generation"],
        size_categories=size_of(total),
        pretty_name=f"What {subject.own.parent.run_id} was trained on",
        source_datasets=datasets(subject) or None,
    )
    rows = [
        f"| {run.run_id} | {run.stage} | {run.edge} | {run.kind} | {count(run.rows)} | {count(run.tokens)} |"
        for run in runs
    ]
    shares = [
        f"- {name}: "
        + ", ".join(f"{value or 'unknown'} {percent(n / total)}%" for value, n in counts.items())
        for name, counts in training_data.shares(runs).items()
        if counts and total
    ]
    return page(
        front.to_yaml(),
        f"# What {subject.own.parent.run_id} was trained on",
        "Over its whole lineage; `weights` went on into this checkpoint, `data` made samples or scored.",
        "\n".join(["| run | stage | edge | kind | rows | tokens |", "|---|---|---|---|---|---|", *rows]),
        *([f"## Shares of its {total:,} rows", "\n".join(shares)] if total else []),
        *sections(answers, ABOUT_DATA),
        "## Samples",
        "\n\n".join(examples(subject)) or NOT_RECORDED,
    )


def page(front: str, *parts: str) -> str:
    return "\n\n".join([f"---\n{front.strip()}\n---", *parts]) + "\n"


def sections(answers: dict[str, Answer], names: Iterable[str]) -> list[str]:
    """A heading with the question, and what is known."""
    questions = read_checklist(None)
    parts = []
    for name in names:
        answer = answers[name]
        lines = [f"- {line.strip()}" for line in answer.lines]
        gap = [NOT_RECORDED] if answer.status == Answer.MISSING else []
        parts += [f"## {questions[name]['question']}", "\n".join([*gap, *lines])]
    return parts


def count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"


def licence_of(subject: Subject) -> dict[str, Any]:
    """The licence of the data where all of it has the same, else `other` with their names; nothing where the
    licence of some is unknown."""
    found = training_data.licences(subject.trained_on)
    if None in found or not found:
        return {}
    if len(found) == 1:
        return {"license": str(found[0]).lower()}
    return {"license": "other", "license_name": " and ".join(map(str, found))}


def languages(subject: Subject) -> list[str] | None:
    """Those of all rows, and those of the documents of pre-training, which no row lists."""
    found = [language for language in training_data.shares(subject.trained_on)["language"] if language]
    documents = {run.run_id for run in subject.trained_on if run.kind == "documents"}
    for one in subject.trained:
        if one.parent.run_id in documents:
            found += ((record_of(one).get("config") or {}).get("data") or {}).get("languages") or []
    return [*dict.fromkeys(found)] or None


def datasets(subject: Subject) -> list[str]:
    """The data sets of all runs, by the names in their records."""
    named = [(record_of(one).get("data") or {}).get("name") for one in subject.trained]
    return [str(name) for name in dict.fromkeys(named) if name]


def base_of(subject: Subject) -> str | None:
    """The imported weights that it started from, as their folder is called."""
    outside = [one for one in subject.all if one.edge == "weights" and one.record is None]
    return outside[-1].parent.run_id if outside else None


def size_of(rows: int) -> str:
    """The hub's name for a number of rows."""
    bounds = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}
    return next((name for bound, name in bounds.items() if rows < bound), "n>1M")


def examples(subject: Subject) -> list[str]:
    """A few samples of the newest run that lists its own."""
    for one in subject.trained:
        path = training_data.dataset_of(folder_of(one))
        if path is None:
            continue
        rows = [row for row in samples.read(path) if row["response"]]
        shown = rows[:: max(1, len(rows) // EXAMPLES)][:EXAMPLES]
        return [
            f"`{row['prompt_id']}`, from {row['source'] or 'unknown'}:\n\n{quoted(row['question'])}\n\n"
            f"{quoted(row['response'])}"
            for row in shown
        ]
    return []


def quoted(text: str) -> str:
    """As a block of code, which nothing in the text can end."""
    text = text if len(text) <= LONGEST else f"{text[:LONGEST]} […]"
    return "\n".join(f"    {line}" for line in text.splitlines())
