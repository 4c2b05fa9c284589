"""A checkpoint's shape, tokenizer and data: whether they fit a stage, and as overrides for `r1pipe eval`."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from r1pipe.config import BenchmarkConfig, HFConfig, ModelConfig, ParentRef, RunConfig, to_mapping
from r1pipe.config.benchmark import OWN_SCORING, task_of
from r1pipe.config.changes import changes, listed
from r1pipe.config.data import USED
from r1pipe.config.groups import options, read
from r1pipe.config.hf import DEEPSEEK
from r1pipe.config.hf import NAME as HF
from r1pipe.core import gguf
from r1pipe.core.chat_template import sha256, split_system, with_system
from r1pipe.core.errors import CheckpointError
from r1pipe.core.paths import RunFolder, inside
from r1pipe.runs.files import read_object
from r1pipe.runs.lineage.lookup import is_run

UNCHECKED = ("name", "initializer_range")  # keys that may differ between a checkpoint and the model
UNLIKE = frozenset((*UNCHECKED, "num_nextn_predict_layers"))  # do not change what weights do
OF_HF = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")  # compared, with model=hf
TOKENIZER, TOKENIZER_SETTINGS = "tokenizer.json", "tokenizer_config.json"


def check_parent_fits(parent: ParentRef, model: ModelConfig | HFConfig) -> None:
    """Raises CheckpointError if the checkpoint's config.json has another shape than `model`."""
    published = read_object(Path(parent.checkpoint) / "config.json")
    if isinstance(model, HFConfig):
        for key in (
            OF_HF[1:] if Path(model.path).suffix == gguf.SUFFIX else OF_HF
        ):  # llama.cpp has other names
            if published.get(key) != getattr(model, key):
                raise CheckpointError(
                    f"{parent.checkpoint} has {key}={published.get(key)}, but model.path={model.path} has "
                    f"{getattr(model, key)}; give model.path={parent.checkpoint}, or another pipeline=NAME"
                )
        return
    if is_of_transformers(published):
        raise CheckpointError(
            f"{parent.checkpoint} has model_type={published['model_type']}, which model={model.name} does "
            f"not compute; give model=hf model.path={parent.checkpoint}"
        )

    def fits(name: str) -> bool:
        shape = read(f"model/{name}").items()
        return not any(differs(published, key, value) for key, value in shape if key not in UNCHECKED)

    for key, value in asdict(model).items():
        if key not in UNCHECKED and differs(published, key, value):
            fitting = [name for name in bundled_models() if fits(name)]
            other = f"give model={fitting[0]}" if fitting else f"give a model with this {key}"
            remedy = f"drop model.{key}={value}" if model.name in fitting else other
            raise CheckpointError(
                f"{parent.checkpoint} has {key}={published[key]}, but the config has model.{key}={value}; "
                f"{remedy}"
            )


def is_of_transformers(published: dict[str, Any]) -> bool:
    """Whether a checkpoint's config.json is of another model than DeepSeek's."""
    kind = published.get("model_type")
    return isinstance(kind, str) and kind not in DEEPSEEK


def bundled_models() -> list[str]:
    return [name for name in options("model") if name != HF]


def differs(published: dict[str, Any], key: str, value: Any) -> bool:
    """Whether a checkpoint's config.json has another value; it may leave keys out."""
    own = published.get(key, value)
    if isinstance(own, dict) and isinstance(value, dict):
        return any(differs(own, inner, wanted) for inner, wanted in value.items())
    return own != value


class ChatFormat(NamedTuple):
    """What parents must share."""

    tokenizer: str  # hash of the tokens with their ids
    template: str  # without its system prompt
    system: str  # the system prompt; "": none


def check_same_chat_format(
    weights: ParentRef | None, read: Iterable[ParentRef], system: str | None = None
) -> None:
    """Raises CheckpointError if a parent has no tokenizer, or one with more tokens than the embedding has
    rows, or if two parents have different tokens, chat templates or, where `system` is None, system prompts.

    This reads JSON alone; the job loads the tokenizers themselves (`Run.load_chat`).
    """
    parents = [parent for parent in (weights, *read) if parent is not None]
    formats = [chat_format(Path(parent.checkpoint), system) for parent in parents]
    for parent, chat in zip(parents, formats, strict=True):
        apart = [
            name for name, own, first in zip(chat._fields, chat, formats[0], strict=True) if own != first
        ]
        if apart:
            what = {"template": "chat template", "system": "system prompt"}.get(apart[0], apart[0])
            give = ', or give chat.system=TEXT (or "") for both' if apart == ["system"] else ""
            raise CheckpointError(
                f"{parent.checkpoint} (stage {parent.stage}) has another {what} than "
                f"{parents[0].checkpoint}; take both from one pipeline{give}"
            )


def chat_format(checkpoint: Path, system: str | None = None) -> ChatFormat:
    """A checkpoint's chat format, with `system` instead of its own system prompt unless that is None.

    Raises CheckpointError.
    """
    for name in (TOKENIZER, TOKENIZER_SETTINGS):
        if not (checkpoint / name).exists():
            raise CheckpointError(
                f"{checkpoint / name} is missing: a stage cannot start from a checkpoint without tokenizer "
                "and chat template; put them there and import again"
            )
        inside(checkpoint, name, checkpoint)
    path = checkpoint / TOKENIZER
    content = read_object(path)
    try:
        vocabulary = content["model"]["vocab"]
        if not isinstance(vocabulary, dict):  # Unigram: [token, score], ordered by id
            vocabulary = {entry[0]: number for number, entry in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
        ids = {str(token): int(number) for token, number in (vocabulary | added).items()}
    except (KeyError, TypeError, ValueError, IndexError, OverflowError):
        raise CheckpointError(f"{path}: the vocabulary cannot be read; export it again") from None
    shape = checkpoint / "config.json"  # a checkpoint of reward models has one for each model instead
    rows = read_object(shape).get("vocab_size") if shape.exists() else None
    last = max(ids.values(), default=-1)
    if isinstance(rows, int) and last >= rows:
        raise CheckpointError(
            f"{path} has token {last}, but {shape} has "
            f"vocab_size={rows}; give the tokenizer that the weights were trained with"
        )
    ids_hash = hashlib.sha256(json.dumps(ids, sort_keys=True).encode()).hexdigest()
    return ChatFormat(ids_hash, *split_system(with_system(template_of(checkpoint), system)))


def template_hash(checkpoint: Path) -> str:
    """SHA-256 of the chat template, as in records. Raises CheckpointError."""
    return sha256(template_of(checkpoint))


def template_of(checkpoint: Path) -> str:
    """The chat template as it is written. Raises CheckpointError."""
    path = checkpoint / TOKENIZER_SETTINGS
    template = read_object(path).get("chat_template")
    if not isinstance(template, str):
        raise CheckpointError(f"{path} has no chat_template; export it again")
    return template


# --- as overrides


def settings_of(parent: ParentRef, given: set[str]) -> list[str]:
    """Overrides that restore a checkpoint's model and its run's data, except for the keys in `given`."""
    overrides = []
    published = read_object(Path(parent.checkpoint) / "config.json")
    if "model" not in given and is_of_transformers(published):
        own = (config_of(parent) or {}).get("model", {})
        chosen = {key: own[key] for key in ("attention", "max_position_embeddings") if key in own}
        chosen["path"] = parent.checkpoint
        overrides = ["model=hf", *(f"model.{key}={hydra(value)}" for key, value in chosen.items())]
    elif "model" not in given:  # the nearest model of conf/, and the keys that differ
        differences = {}
        for name in bundled_models():
            shape = read(f"model/{name}")
            keys = [key for key in shape.keys() - UNLIKE if published.get(key, shape[key]) != shape[key]]
            differences[name] = sorted(keys)
        name = min(differences, key=lambda option: len(differences[option]))
        overrides = [f"model={name}", *(f"model.{key}={hydra(published[key])}" for key in differences[name])]
    config = config_of(parent)
    if config:
        overrides += [f"pipeline={json.dumps(config['pipeline'])}", f"seed={config['seed']}"]
    if config and "data" not in given:
        data = config["data"]
        keys = [key for key in USED[data["kind"]] if key in data]
        overrides += [f"data={data['name']}", *(f"data.{key}={hydra(data[key])}" for key in keys)]
    return [line for line in overrides if line.partition("=")[0] not in given]


def config_of(parent: ParentRef) -> dict[str, Any] | None:
    """The config.json of a checkpoint's run; None for a bundled or imported checkpoint."""
    run = RunFolder(Path(parent.checkpoint).parent.parent)
    return read_object(run.config) if is_run(run.path) else None


def measured_data(parent: ParentRef, config: RunConfig) -> str:
    """One line: the evaluation's data, its system prompt, and how the checkpoint's run had other data; or the
    benchmark, and what the model's context leaves of its answers."""
    evaluation, own = config.stage.eval, config_of(parent)
    line = f"evaluating on data={config.data.name}, split {evaluation.split}"
    if config.benchmark is not None:
        line = _measured_benchmark(config, config.benchmark)
    elif own is not None:
        mappings = own, to_mapping(config)
        before, after = ({key: mapping[key] for key in ("data", "seed")} for mapping in mappings)
        changed = listed(changes(before, after))
        same = f", as run {parent.run_id} was"
        line += f"; run {parent.run_id} had other data ({changed})" if before != after else same
    _, prompt = split_system(with_system(template_of(Path(parent.checkpoint)), config.chat.system))
    return f"{line}; with the system prompt {prompt!r}" if prompt else line


def _measured_benchmark(config: RunConfig, benchmark: BenchmarkConfig) -> str:
    evaluation, context = config.stage.eval, config.model.max_position_embeddings
    if task := task_of(benchmark):
        return f"evaluating on {task} of lm-evaluation-harness"
    line = f"evaluating on {benchmark.title}: {evaluation.samples} samples a problem at temperature "
    line += f"{evaluation.temperature:g}, top-p {evaluation.top_p:g}, scored by "
    line += OWN_SCORING[benchmark.scored_by]
    if evaluation.max_tokens == context:
        line += f"; answers of {benchmark.max_tokens:,} tokens do not fit the model: they end with its "
        line += f"context of {context:,}"
    elif evaluation.max_tokens < benchmark.max_tokens:
        line += f"; answers end at {evaluation.max_tokens:,} tokens, not {benchmark.max_tokens:,}"
    return line


def hydra(value: Any) -> str:
    """A value in Hydra's grammar, where keys have no quotes."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{hydra(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(hydra, value)) + "]"
    return json.dumps(value, ensure_ascii=False)
