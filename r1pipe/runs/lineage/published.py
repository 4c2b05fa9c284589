"""A folder in Hugging Face's format as a checkpoint: linked beside the run folders, with a manifest.

A GGUF file is first written in that format, by a process that imports transformers.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from r1pipe.config import ParentRef
from r1pipe.config.hf import DEEPSEEK
from r1pipe.core import gguf
from r1pipe.core.errors import CheckpointError
from r1pipe.core.paths import IMPORTED
from r1pipe.runs import checkpoints
from r1pipe.runs.files import read_object, write_json
from r1pipe.runs.lineage import lookup

SETTINGS, TEMPLATE, GENERATION = "tokenizer_config.json", "chat_template.jinja", "generation_config.json"
TOKENIZER = "tokenizer.json"
MORE = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
COPIED = ("config.json", TOKENIZER, *MORE)
LINKED = ("*.safetensors", "*.safetensors.index.json")
CONVERT = "r1pipe.model.hf.gguf"  # run as a module: it is of the jobs' side


def is_published(folder: Path) -> bool:
    """Whether a path is a model of transformers, or a GGUF file, and no checkpoint of r1pipe. Raises
    CheckpointError, and ConfigError where a folder has several GGUF files."""
    if gguf.find(folder):
        return True
    shape = folder / "config.json"
    if not shape.is_file() or (folder / checkpoints.MANIFEST).exists():
        return False
    kind = read_object(shape).get("model_type")
    return isinstance(kind, str) and kind not in DEEPSEEK


def adopt(folder: Path, root: Path) -> ParentRef:
    """The checkpoint ROOT/imported/NAME-STATE of a folder, made if it is not there: STATE tells whether files
    have changed since. Weights are hard links where the file system allows. The chat template, wherever the
    folder has it, then stands in tokenizer_config.json. Of a GGUF file, the weights are written anew.

    Raises CheckpointError, one line, where tokenizer or template are missing, or a GGUF file cannot be read.
    """
    folder = folder.resolve()
    if file := gguf.find(folder):
        return _adopt_gguf(file, root)
    if (folder / checkpoints.MANIFEST).exists():  # one of r1pipe's checkpoints
        return lookup.checkpoint_of_folder(folder)
    weights, texts = _weights(folder), _texts(folder)
    state = hashlib.sha256()
    for path in weights:
        facts = path.stat()
        state.update(f"{path.name} {facts.st_size} {facts.st_mtime_ns}\n".encode())
    for path in texts:
        state.update(path.name.encode() + path.read_bytes())
    target = root.resolve() / IMPORTED / f"{folder.name}-{state.hexdigest()[:8]}"
    if target.exists():
        return lookup.checkpoint_of_folder(target)
    _fill(target, folder, weights, texts)
    return lookup.checkpoint_of_folder(target)


def _adopt_gguf(file: Path, root: Path) -> ParentRef:
    facts = file.stat()
    state = hashlib.sha256(f"{file.name} {facts.st_size} {facts.st_mtime_ns}".encode()).hexdigest()
    target = root.resolve() / IMPORTED / f"{file.stem}-{state[:8]}"
    if target.exists():
        return lookup.checkpoint_of_folder(target)
    print(f"{file.name}: written as safetensors, once, to {target}", file=sys.stderr, flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".gguf-") as name:
        line = [sys.executable, "-m", CONVERT, str(file), name]
        done = subprocess.run(line, capture_output=True, check=False, stdin=subprocess.DEVNULL)
        if done.returncode:
            said = done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
            raise CheckpointError(said[-1].removeprefix("r1pipe: "))
        folder = Path(name)
        _fill(target, folder, _weights(folder), _texts(folder))
    return lookup.checkpoint_of_folder(target)


def _weights(folder: Path) -> list[Path]:
    return sorted(path for pattern in LINKED for path in folder.glob(pattern))


def _texts(folder: Path) -> list[Path]:
    return [folder / name for name in (*COPIED, SETTINGS, TEMPLATE, GENERATION) if (folder / name).is_file()]


def _fill(target: Path, folder: Path, weights: list[Path], texts: list[Path]) -> None:
    """Make the checkpoint `target` of a folder's weights and texts. Raises CheckpointError."""
    settings = _settings(folder)
    with checkpoints.whole(target) as unfinished:
        for path in weights:
            _link(path.resolve(), unfinished / path.name)
        for path in texts:
            if path.name in (*COPIED, GENERATION):
                shutil.copyfile(path, unfinished / path.name)
        write_json(unfinished / SETTINGS, settings, indent=2)
        if not (folder / GENERATION).is_file():
            config = read_object(folder / "config.json")
            ids = {key: value for key, value in config.items() if key.endswith("_token_id")}
            write_json(unfinished / GENERATION, ids)


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json with the chat template. Raises CheckpointError."""
    for name in (TOKENIZER, SETTINGS):
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{folder / name} is missing: a stage needs the tokenizer of its model; write it there with "
                "AutoTokenizer.from_pretrained(MODEL).save_pretrained(DIR)"
            )
    settings = read_object(folder / SETTINGS)
    template = settings.get("chat_template")
    if (folder / TEMPLATE).is_file():  # transformers reads this one first
        template = (folder / TEMPLATE).read_text(encoding="utf-8")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if not isinstance(template, str):
        raise CheckpointError(
            f"{folder} has no chat template, neither in {SETTINGS} nor as {TEMPLATE}; put that of the "
            "model's chat version there"
        )
    return settings | {"chat_template": template}


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
