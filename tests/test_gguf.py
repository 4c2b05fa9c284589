"""`model=hf` from a GGUF file: the same model as its safetensors, and one line for a file that is none."""

import shutil
from pathlib import Path

import pytest
import torch
from gguf_files import write_gguf
from hf_models import write_model

from r1pipe.chat.template import Chat
from r1pipe.config import HFConfig
from r1pipe.config.compose import compose
from r1pipe.core.errors import CheckpointError, ConfigError, R1pipeError
from r1pipe.core.types import Prompt
from r1pipe.launch.parents import resolve, with_parents
from r1pipe.model import load_pretrained
from r1pipe.model.hf.gguf import convert
from r1pipe.runs.lineage import SearchPath
from r1pipe.runs.lineage.published import adopt


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in both formats: `model/`, and `packed/tiny.gguf`."""
    place = tmp_path_factory.mktemp("place")
    write_model(place / "model", "qwen2")
    (place / "packed").mkdir()
    write_gguf(place / "model", place / "packed" / "tiny.gguf")
    return place


def test_a_gguf_file_is_the_model_that_it_was_written_from(place: Path) -> None:
    words = ["stage=cold_start", "recipe=smoke", "model=hf", "model.lora.rank=4", f"root={place / 'runs'}"]
    config = compose([*words, f"model.path={place / 'packed'}"]).config
    plain = compose([*words, f"model.path={place / 'model'}"]).config
    assert isinstance(config.model, HFConfig) and isinstance(plain.model, HFConfig)
    assert config.model.path == str(place / "packed" / "tiny.gguf")
    facts = [{**vars(model), "path": "", "parameters": 0} for model in (config.model, plain.model)]
    assert facts[0] == facts[1], "the header says what config.json says"
    parent = with_parents(config).weights_from
    assert parent and parent == with_parents(config).weights_from, "it is converted once"
    assert resolve(config.model.path, SearchPath.of(config)) == parent
    assert len(list((place / "runs" / "imported").iterdir())) == 1, "nothing unfinished is left"
    tokens = torch.randint(0, 1100, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        one, other = (load_pretrained(path)(tokens) for path in (parent.checkpoint, place / "model"))
    assert torch.equal(one, other)
    chats = [Chat.load(path) for path in (parent.checkpoint, place / "model")]
    asked = Prompt("p", "gsm8k", "en", "Ann has 123 apples and 4.5 pears；几个？ How many?", "1")
    assert chats[0].prompt_tokens(asked) == chats[1].prompt_tokens(asked)
    assert (chats[0].eos_ids, chats[0].system) == (chats[1].eos_ids[:1], chats[1].system)


def damaged(place: Path, tmp_path: Path, kind: str) -> Path:
    file = tmp_path / "bad.gguf"
    whole = (place / "packed" / "tiny.gguf").read_bytes()
    if kind == "no template":
        return write_gguf(place / "model", file, template=False)
    if kind == "no such architecture":
        return write_gguf(place / "model", file, architecture="plamo")
    contents = {
        "cut off in the header": whole[:3000],
        "cut off in the data": whole[: len(whole) // 2],
        "cut off in the last tensor": whole[:-10],
        "something else": b"PK\x03\x04" + whole,
        "a length that is too large": whole[:24] + b"\xff" * 8 + whole[32:],
    }
    file.write_bytes(contents[kind])
    return file


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("cut off in the header", "is no whole GGUF file (it is cut off)"),
        ("cut off in the data", "is no whole GGUF file (it is cut off)"),
        ("something else", "it does not begin with GGUF"),
        ("a length that is too large", "is too long"),
    ],
)
def test_a_damaged_file_is_refused_before_anything_starts(
    place: Path, tmp_path: Path, kind: str, told: str
) -> None:
    file = damaged(place, tmp_path, kind)
    with pytest.raises(ConfigError) as error:
        compose(["stage=cold_start", "model=hf", f"model.path={file}"])
    assert told in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "told"),
    [("no template", "has no chat template"), ("no such architecture", "plamo")],
)
def test_what_transformers_cannot_use_is_one_line(place: Path, tmp_path: Path, kind: str, told: str) -> None:
    file = damaged(place, tmp_path, kind)
    with pytest.raises(CheckpointError) as error:
        convert(file, tmp_path / "made")
    assert told in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


def test_a_failed_conversion_leaves_its_line_and_no_folder(place: Path, tmp_path: Path) -> None:
    file = damaged(place, tmp_path, "cut off in the last tensor")
    with pytest.raises(CheckpointError) as error:
        adopt(file, tmp_path)
    assert str(error.value).startswith(f"{file}: transformers cannot read") and "\n" not in str(error.value)
    assert not list((tmp_path / "imported").iterdir())


def test_a_folder_with_several_files_is_refused(place: Path, tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        shutil.copyfile(place / "packed" / "tiny.gguf", tmp_path / name)
    with pytest.raises(R1pipeError, match=r"2 \.gguf files"):
        compose(["stage=cold_start", "model=hf", f"model.path={tmp_path}"])
