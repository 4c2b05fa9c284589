"""`model=hf`: what is read from its folder, what is refused before anything starts, and the run's parents."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from fakes import House
from safetensors.numpy import save_file

from r1pipe.config import HFConfig, RunConfig, load, to_mapping
from r1pipe.config.compose import compose
from r1pipe.core.errors import CheckpointError, ConfigError
from r1pipe.launch.parents import with_parents
from r1pipe.plan import footprint
from r1pipe.runs import checkpoints
from r1pipe.runs.files import read_object
from r1pipe.runs.lineage.fit import settings_of
from r1pipe.runs.lineage.published import adopt

CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "eos_token_id": 3,
}
TOKENIZER = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": []}
SETTINGS = {"eos_token": "b", "chat_template": "{{ messages }}"}


def publish(folder: Path, **changes: object) -> Path:
    """A folder as the hub has them, but for the weights' names."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS))
    shapes = {"model.layers.0.mlp.up_proj.weight": (64, 16), "model.norm.weight": (16,)}
    save_file({name: np.zeros(s, np.float32) for name, s in shapes.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return publish(tmp_path / "small")


def composed(folder: Path, *words: str, stage: str = "cold_start") -> RunConfig:
    return compose([f"stage={stage}", "model=hf", f"model.path={folder}", *words]).config


def test_the_shape_is_the_folders(folder: Path) -> None:
    config = composed(folder)
    model = config.model
    assert isinstance(model, HFConfig)
    assert (model.vocab_size, model.num_experts, model.parameters) == (64, 0, 64 * 16 + 16)
    assert model.max_position_embeddings == 32768 and model.cache_width == 2 * 2 * 4
    assert composed(folder, "model.max_position_embeddings=512").model.max_position_embeddings == 512
    assert load(to_mapping(config)) == config, "a run folder's config.json is read again"
    assert footprint.estimates(config)["memory"].startswith("about ")


@pytest.mark.parametrize(
    ("changes", "words", "told"),
    [
        ({}, "engine.precision=fp8", "engine.precision=fp8 is for the bundled model"),
        ({}, "engine.accelerator=cuda engine.graphs=true", "engine.graphs=true is for the bundled model"),
        ({}, "engine.accelerator=cuda engine.attention=flex", "engine.attention=flex is for the bundled"),
        ({}, "engine.expert_parallel=2", "with model=hf give engine.expert_parallel=1"),
        ({}, "engine.ranks=2 engine.pipeline=2", "with model=hf give engine.pipeline=1"),
        ({}, "engine.schedule=zbv", "with model=hf give engine.schedule=1f1b"),
        ({}, "stage=pretrain", "stage=pretrain is for the bundled model"),
        ({}, "model.max_position_embeddings=40000", "longer than max_position_embeddings=32768"),
        ({"use_sliding_window": True}, "", "longer than sliding_window=4096"),
        (
            {"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 4096}},
            "",
            "longer than original_max_position_embeddings=4096",
        ),
        ({"num_experts": 8}, "stage.router.balance_alpha=0.1", "give stage.router.balance_alpha=0"),
        (
            {"num_experts": 8},
            "stage=grpo stage.routing_check_samples=2",
            "give stage.routing_check_samples=0",
        ),
        ({"model_type": "deepseek_v3"}, "", "r1pipe import"),
        ({"model_type": None}, "", "has no model_type"),
        ({"num_attention_heads": None}, "", "give a causal language model"),
        ({"vocab_size": "many"}, "", "model.vocab_size=many is text"),
        ({}, "model.vocab_size=5", "model.vocab_size is no key of the config"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path, changes: dict, words: str, told: str) -> None:
    folder = publish(tmp_path / "other", **changes)
    with pytest.raises(ConfigError) as caught:
        composed(folder, *words.split())
    assert told in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "model.safetensors").rename(f / "model.bin"), "no *.safetensors, only .bin"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 30), "is no safetensors file"),
        (shutil.rmtree, "has no config.json"),
    ],
)
def test_a_folder_that_is_no_model_is_refused_in_one_line(folder: Path, spoil, told: str) -> None:
    spoil(folder)
    with pytest.raises(ConfigError) as caught:
        composed(folder)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_no_path_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model=hf needs model\.path=DIR"):
        compose(["stage=cold_start", "model=hf"])


# --- as a checkpoint


def test_the_first_stage_starts_from_the_folder(house: House, folder: Path) -> None:
    config = composed(folder, f"root={house.root}", "pipeline=mine")
    filled = with_parents(config)
    parent = filled.weights_from
    assert parent is not None and Path(parent.checkpoint).parent == house.root.resolve() / "imported"
    checkpoints.verify(parent.checkpoint, parent.hash)
    assert os.path.samefile(folder / "model.safetensors", Path(parent.checkpoint) / "model.safetensors")
    assert read_object(Path(parent.checkpoint) / "generation_config.json") == {"eos_token_id": 3}
    assert with_parents(config).weights_from == parent, "made once"
    by_path = composed(folder, f"root={house.root}", f"parent={folder}", stage="grpo")
    assert with_parents(by_path).weights_from == parent
    assert f"model.path={json.dumps(parent.checkpoint)}" in settings_of(parent, set())


def test_changed_files_are_another_checkpoint(folder: Path, tmp_path: Path) -> None:
    first = adopt(folder, tmp_path / "runs")
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS | {"chat_template": "other"}))
    second = adopt(folder, tmp_path / "runs")
    assert first.checkpoint != second.checkpoint and first.hash != second.hash
    assert adopt(Path(second.checkpoint), tmp_path / "runs") == second, "a checkpoint stays where it is"


@pytest.mark.parametrize("form", ["file", "list"])
def test_the_template_may_stand_elsewhere(folder: Path, tmp_path: Path, form: str) -> None:
    listed = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    settings = SETTINGS | {"chat_template": listed if form == "list" else "old"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if form == "file":
        (folder / "chat_template.jinja").write_text("yes")
    adopted = Path(adopt(folder, tmp_path / "runs").checkpoint)
    assert read_object(adopted / "tokenizer_config.json")["chat_template"] == "yes"
    assert not (adopted / "chat_template.jinja").exists(), "one template, not two"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("tokenizer.json", "tokenizer.json is missing"),
        ("tokenizer_config.json", "tokenizer_config.json is missing"),
    ],
)
def test_no_tokenizer_is_one_line(folder: Path, tmp_path: Path, name: str, told: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=told):
        adopt(folder, tmp_path / "runs")
    assert not list((tmp_path / "runs").rglob("*.safetensors")), "nothing is left"


def test_no_template_is_one_line(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no chat template"):
        adopt(folder, tmp_path / "runs")


def test_another_model_is_no_parent(house: House, folder: Path, tmp_path: Path) -> None:
    other = publish(tmp_path / "wide", hidden_size=32)
    config = composed(folder, f"root={house.root}", f"parent={other}")
    with pytest.raises(CheckpointError, match=r"has hidden_size=32, but model.path=.* has 16"):
        with_parents(config)
    bundled = compose(["stage=cold_start", f"root={house.root}", f"parent={other}"]).config
    with pytest.raises(CheckpointError, match=r"give model=hf model\.path="):
        with_parents(bundled)


# --- adapters


def layered(folder: Path, **changes: object) -> Path:
    """A folder whose tensors are named as those of a decoder with experts."""
    publish(folder, **changes)
    shapes = {
        "model.embed_tokens.weight": (64, 16),
        "model.layers.0.self_attn.q_proj.weight": (16, 16),
        "model.layers.0.self_attn.q_proj.bias": (16,),
        "model.layers.0.mlp.gate.weight": (4, 16),
        "model.layers.0.mlp.experts.0.up_proj.weight": (8, 16),
        "model.layers.1.mlp.down_proj.weight": (16, 24),
        "lm_head.weight": (64, 16),
    }
    save_file({name: np.zeros(s, np.float32) for name, s in shapes.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("words", "weights"),
    [
        ("model.lora.rank=4", 4 * (16 + 16 + 16 + 24)),
        ("model.lora.rank=4 model.lora.targets=[q_proj]", 4 * 32),
        ("model.lora.rank=0", 0),
        ("", 0),
    ],
)
def test_adapters_are_counted_and_need_little_memory(tmp_path: Path, words: str, weights: int) -> None:
    folder, more = layered(tmp_path / "layered"), words.split()
    config = composed(folder, *more, "engine.zero_level=0", "stage.kl_coef=0.001", stage="grpo")
    assert isinstance(config.model, HFConfig) and footprint.adapters(config.model) == weights
    assert load(to_mapping(config)) == config
    total = config.model.parameters + weights
    trained = weights or total
    assert footprint.engines(config) == [(total, trained)]
    copied = 0 if weights else total  # the reference
    assert footprint.states(config) == 4 * (total + copied) + (8 + 4) * trained


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("model.lora.rank=4 model.lora.targets=[q_prog]", "did you mean q_proj?"),
        ("model.lora.rank=4 model.lora.targets=[lm_head]", "lm_head is no linear layer of"),
        ("model.lora.rank=4 model.lora.targets=[up_proj]", "up_proj is a layer of experts"),
        ("model.lora.rank=4 model.lora.targets=[]", "leaves nothing to train"),
        ("model.lora.rank=-1", "model.lora.rank=-1 must be 0 or more"),
        ("model.lora.rank=4 model.lora.alpha=0", "model.lora.alpha=0 must be above 0"),
        ("model.lora.alpha=4", "model.lora.alpha=4.0 needs model.lora.rank=NUMBER"),
        ("model.lora.targets=[q_proj]", "needs model.lora.rank=NUMBER"),
        (
            "model.lora.rank=4 model.lora.targets=q_proj",
            "model.lora.targets=q_proj is text, but must be a list",
        ),
        ("model.lora.rnk=4", "model.lora.rnk is no key of the config; did you mean model.lora.rank?"),
    ],
)
def test_adapters_that_cannot_be_are_refused_in_one_line(tmp_path: Path, words: str, told: str) -> None:
    folder = layered(tmp_path / "layered")
    with pytest.raises(ConfigError) as caught:
        composed(folder, *words.split())
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_adapters_need_a_model_of_transformers() -> None:
    with pytest.raises(ConfigError, match=r"model\.lora\.rank needs model=hf"):
        compose(["stage=grpo", "model=laptop", "model.lora.rank=16"])
