"""Where checkpoints come from: resolve a CHECKPOINT to a folder and its hash, and walk its ancestors.

CHECKPOINT is a run id, a path (run folder or checkpoint folder), a stage name (its newest finished run
in this pipeline), or `models:/name@alias`.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.text import Text

from r1pipe import checkpoints
from r1pipe.config.groups import options, read
from r1pipe.config.schema import STAGE_TYPES, EvaluateConfig, ModelConfig, ParentRef, RunConfig
from r1pipe.errors import CheckpointError, nearest
from r1pipe.paths import RunFolder, content_dir

BUNDLED = "bundled"
NOTHING: Mapping[str, ParentRef] = {}


@dataclass(frozen=True)
class Place:
    """Where names of checkpoints are looked up."""

    root: Path
    pipeline: str
    tracking_uri: str | None

    @classmethod
    def of(cls, config: RunConfig) -> "Place":
        return cls(Path(config.root), config.pipeline, config.tracking.uri)


def record_of(run: RunFolder) -> dict[str, Any]:
    """The record of a finished run. Raises CheckpointError where there is none."""
    try:
        return json.loads(run.record.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"run {run.run_id} has not finished; let it (`r1pipe run` goes on with it) or give a path in "
            f"{run.checkpoints}"
        ) from None
    except json.JSONDecodeError:
        raise CheckpointError(f"{run.record} cannot be read; make the run again (--fresh)") from None


def runs(root: Path) -> list[RunFolder]:
    """Every run folder under the root, finished or not."""
    return [RunFolder(path.parent) for path in sorted(root.glob("*/config.json"))]


def newest(stage: str, place: Place) -> RunFolder | None:
    """The run of this stage and pipeline that finished last."""
    found = []
    for run in runs(place.root):
        if run.record.exists() and run.run_id.startswith(f"{stage}-"):
            record = record_of(run)
            if (record["stage"], record["pipeline"]) == (stage, place.pipeline):
                found.append((record["created"], run.run_id, run))
    return max(found, key=lambda entry: entry[:2])[2] if found else None


def of_run(run: RunFolder) -> ParentRef:
    """What a finished run made."""
    record = record_of(run)
    folder = (run.path / record["checkpoint"]).resolve()
    return ParentRef(record["stage"], run.run_id, str(folder), record["checkpoint_hash"])


def of_folder(folder: Path) -> ParentRef:
    """A checkpoint folder by itself; inside a run folder it is known by the run. Raises CheckpointError."""
    folder = folder.resolve()
    run = RunFolder(folder.parent.parent)
    known = (
        json.loads(run.config.read_text(encoding="utf-8"))
        if folder.parent.name == run.checkpoints.name
        else {}
    )
    stage = known.get("stage", {}).get("name", "external")
    run_id = run.run_id if known else folder.name
    return ParentRef(stage, run_id, str(folder), checkpoints.manifest_hash(folder))


def bundled() -> ParentRef:
    """The base that comes with r1pipe. Raises CheckpointError."""
    folder = content_dir() / "base"
    return replace(of_folder(folder), stage="pretrain", run_id=BUNDLED)


def of_stage(stage: str, place: Place, without_runs: Collection[str] = ()) -> ParentRef:
    """The newest finished run of a stage; without one, `pretrain` means the bundled base, and a stage that
    only measures means what it would have measured. Raises CheckpointError."""
    run = None if stage in without_runs else newest(stage, place)
    if run is not None:
        return of_run(run)
    if stage == "pretrain":
        return bundled()
    above = read(f"stage/{stage}")["starts_from"]
    if STAGE_TYPES[stage] is EvaluateConfig and above is not None:
        return of_stage(above, place, without_runs)
    elsewhere = sorted({record_of(run)["pipeline"] for run in runs(place.root) if run.record.exists()})
    others = [name for name in elsewhere if newest(stage, replace(place, pipeline=name))]
    hint = f"; other pipelines have one: pipeline={others[0]}" if others else ""
    raise CheckpointError(
        f"stage {stage} has no finished run in pipeline {place.pipeline} under {place.root}; make it with "
        f"`r1pipe run stage={stage}` or give parent=CHECKPOINT{hint}"
    )


def resolve(name: str, place: Place) -> ParentRef:
    """The checkpoint that a user means by `name`. Raises CheckpointError naming the nearest known one."""
    if name.startswith("models:/"):
        from r1pipe.tracking import resolve_model

        return of_folder(resolve_model(name, place.root, place.tracking_uri))
    if name in STAGE_TYPES:
        return of_stage(name, place)
    if name == BUNDLED:
        return bundled()
    for path in (place.root / name, Path(name)):
        if is_run(path):
            return of_run(RunFolder(path.resolve()))
        if path.is_dir():
            return of_folder(path)
    known = [run.run_id for run in runs(place.root) if run.record.exists()]
    raise CheckpointError(f"no checkpoint {name}; {nearest(name, [*STAGE_TYPES, *known])}")


def settings_of(parent: ParentRef, given: set[str]) -> list[str]:
    """Overrides that take a checkpoint as its run left it, where the user (keys in `given`) says nothing."""
    run = RunFolder(Path(parent.checkpoint).parent.parent)
    taken = [] if "model" in given else model_settings(Path(parent.checkpoint))
    if is_run(run.path):
        config = json.loads(run.config.read_text(encoding="utf-8"))
        taken += [f"data={config['data']['name']}", f"pipeline={json.dumps(config['pipeline'])}"]
    return [line for line in taken if line.partition("=")[0] not in given]


def model_settings(checkpoint: Path) -> list[str]:
    """Overrides that describe a checkpoint's shape: the nearest model of conf/, and what differs."""
    published = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    apart = {}
    for name in options("model"):
        shape = read(f"model/{name}")
        apart[name] = {
            key: published[key]
            for key in shape.keys() - UNLIKE
            if published.get(key, shape[key]) != shape[key]
        }
    name = min(apart, key=lambda option: len(apart[option]))
    return [f"model={name}", *(f"model.{key}={hydra(value)}" for key, value in sorted(apart[name].items()))]


def hydra(value: Any) -> str:
    """A value in Hydra's grammar, in which keys have no quotes."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{hydra(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value)


UNLIKE = frozenset(
    ("name", "initializer_range", "num_nextn_predict_layers")
)  # say nothing of what the weights compute


def is_run(path: Path) -> bool:
    """A run folder's config.json names a stage, a checkpoint's does not."""
    config = path / "config.json"
    return config.is_file() and "stage" in json.loads(config.read_text(encoding="utf-8"))


def with_parents(
    config: RunConfig, made: Mapping[str, ParentRef] = NOTHING, later: Collection[str] = ()
) -> RunConfig:
    """The config with its edges filled in. Raises CheckpointError where a parent is missing or does not fit.

    In a walk of a recipe, `made` holds what its earlier stages made, and `later` names those to come: a run
    that one of them left behind is nobody's parent now, or a second walk would differ from the first.
    """
    place, stage = Place.of(config), config.stage
    weights = None
    if config.parent is not None:
        weights = resolve(config.parent, place)
    elif stage.starts_from is not None:
        weights = made.get(stage.starts_from) or of_stage(stage.starts_from, place, later)
    if weights is not None:
        must_fit(weights, config.model)
    reads = {name: made.get(name) or of_stage(name, place, later) for name in stage.reads}
    return replace(config, weights_from=weights, reads_from=reads)


def with_open_parents(config: RunConfig) -> RunConfig:
    """For a dry run: edges that name their stages but no checkpoint, so that no job can start from them."""
    stage = config.stage
    weights = ParentRef(stage.starts_from, "", "", "") if stage.starts_from else None
    reads = {name: ParentRef(name, "", "", "") for name in stage.reads}
    return replace(config, weights_from=weights, reads_from=reads)


def must_fit(parent: ParentRef, model: ModelConfig) -> None:
    """Raises CheckpointError where the checkpoint's config.json has another shape than `model`."""
    published = json.loads((Path(parent.checkpoint) / "config.json").read_text(encoding="utf-8"))
    for key, value in asdict(model).items():
        if key not in ITS_OWN and differs(published, key, value):
            like = [name for name in options("model") if fits(published, read(f"model/{name}"))]
            other = f"give model={like[0]}" if like else f"give a model whose {key} is the same"
            remedy = f"drop model.{key}={value}" if model.name in like else other
            has = f"{parent.checkpoint} has {key}={published[key]}"
            raise CheckpointError(f"{has}, but the config says model.{key}={value}; {remedy}")


ITS_OWN = ("name", "initializer_range")  # what may differ between a checkpoint and the model it becomes


def fits(published: dict[str, Any], shape: dict[str, Any]) -> bool:
    return not any(differs(published, key, value) for key, value in shape.items() if key not in ITS_OWN)


def differs(published: dict[str, Any], key: str, value: Any) -> bool:
    """Whether a checkpoint's config.json says otherwise; of what it leaves out it says nothing."""
    there = published.get(key, value)
    if isinstance(there, dict) and isinstance(value, dict):
        return any(differs(there, inner, wanted) for inner, wanted in value.items())
    return there != value


@dataclass(frozen=True)
class Ancestor:
    """One checkpoint in a lineage, and by which kind of edge its child came from it."""

    depth: int
    edge: str  # "" for the checkpoint asked about, "weights" or "data"
    parent: ParentRef
    record: dict[str, Any]  # {} where it has no run folder here (bundled, or brought from elsewhere)
    problem: str  # why its files are not those that the child was made from; "" if they are


def ancestors(start: ParentRef) -> Iterator[Ancestor]:
    """The checkpoint and all it came from, depth first, each with its hash checked."""
    yield from _walk(start, "", 0)


def show(found: list[Ancestor]) -> None:
    """Print the checkpoint and its ancestors as a tree."""
    from rich.console import Console
    from rich.tree import Tree

    branches: list[Tree] = []
    for ancestor in found:
        label = described(ancestor)
        del branches[ancestor.depth :]
        branches.append(branches[-1].add(label) if branches else Tree(label))
    console = Console(highlight=False)
    if not console.is_terminal:  # a pipe has no edge to wrap at
        console.width = max(
            4 * one.depth + len(line) for one in found for line in described(one).plain.split("\n")
        )
    console.print(branches[0])


def described(ancestor: Ancestor) -> Text:
    parent, record = ancestor.parent, ancestor.record
    label = Text.assemble((f"{ancestor.edge}: " if ancestor.edge else "", "dim"), (parent.stage, "bold"))
    label.append(f"  {parent.run_id}  {parent.hash[:12]}  ")
    label.append(
        "ok" if not ancestor.problem else ancestor.problem, "green" if not ancestor.problem else "red"
    )
    code, data = record.get("code", {}).get("revision"), record.get("data_hash")
    facts = [f"code {code[:10]}" if code else "", f"data {data[:12]}" if data else "", parent.checkpoint]
    label.append("\n" + "  ".join(filter(None, facts)), "dim")
    return label


def _walk(parent: ParentRef, edge: str, depth: int) -> Iterator[Ancestor]:
    run = RunFolder(Path(parent.checkpoint).parent.parent)
    record = record_of(run) if run.record.exists() else {}
    problem = ""
    try:
        checkpoints.verify(parent.checkpoint, parent.hash)
    except CheckpointError as error:
        problem = str(error)
    yield Ancestor(depth, edge, parent, record, problem)
    parents = record.get("parents", {"weights": None, "data": []})
    if parents["weights"]:
        yield from _walk(ParentRef(**parents["weights"]), "weights", depth + 1)
    for reference in parents["data"]:
        yield from _walk(ParentRef(**reference), "data", depth + 1)
