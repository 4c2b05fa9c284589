"""Takes a published checkpoint in: what `r1pipe import` runs. No DeepSpeed here.

    python stages/import_weights.py OPTIONS_FILE     the JSON of r1pipe.config.script_options.ImportOptions

The folder holds safetensors (with an index or in one file; BF16, F32, F16 or FP8 with its scales) under
DeepSeek's names, and config.json. Tensors are checked and copied one by one, bit for bit unless `dtype` is
given; FP8 is dequantised when a job loads it. `target` becomes a checkpoint like those of the stages. MTP
layers are included.
"""

import sys
from pathlib import Path
from shutil import copyfile

import jinja2

from r1pipe.chat.template import TOKENIZER_FILES, Chat
from r1pipe.config import script_options
from r1pipe.config.script_options import ImportOptions
from r1pipe.core import terminal
from r1pipe.core.errors import CheckpointError, DataError
from r1pipe.core.types import Prompt
from r1pipe.model import model_config_from
from r1pipe.model.names import layer_of
from r1pipe.model.reading import GENERATION, Stored
from r1pipe.model.weights import convert
from r1pipe.runs import checkpoints
from r1pipe.runs.files import read_object, write_json

TEMPLATE_FILE = "chat_template.jinja"  # newer transformers have it here, not in tokenizer_config.json


def main(options: ImportOptions) -> None:
    source, target = options.folder, options.target
    if target.exists():
        raise CheckpointError(f"{target} is there already; give another --name, or remove it")
    check_no_outside_links(source)
    with checkpoints.whole(target) as unfinished:
        stored = convert(source, unfinished, options.dtype, int(options.shard_gb * 1e9))
        chat = take_tokenizer(source, unfinished)
        if (source / GENERATION).exists():
            content = read_object(source / GENERATION)
        elif chat is not None:
            content = {"bos_token_id": chat.bos_id, "eos_token_id": chat.eos_id, "pad_token_id": chat.pad_id}
        else:
            config = read_object(source / "config.json")
            content = {key: value for key, value in config.items() if key.endswith("_token_id")}
        write_json(unfinished / GENERATION, content)
    written = Stored(target)
    types = ", ".join(sorted({written.entries[name].dtype for name in written.names()}))
    print(f"{target}: {stored.parameters:,} parameters in {len(stored.names()):,} tensors ({types})")
    layers = model_config_from(target).num_hidden_layers
    if any(layer_of(name) >= layers for name in stored.entries):
        print("its MTP layers travel along: pre-training and SFT train them, sampling does not use them")


def check_no_outside_links(source: Path) -> None:
    """Raises CheckpointError if a file links out of the folder; snapshots/REVISION may link to blobs/, as in
    Hugging Face's cache."""
    home = source.resolve()
    allowed = [home, *(parent / "blobs" for parent in home.parents[1:2])]
    for path in sorted(source.iterdir()) if source.is_dir() else []:
        if not any(path.resolve().is_relative_to(place) for place in allowed):
            raise CheckpointError(f"{path} links to {path.resolve()}, out of its folder; copy the file there")


def take_tokenizer(source: Path, target: Path) -> Chat | None:
    """Copy tokenizer and chat template if r1pipe supports them; otherwise print why not and continue."""
    try:
        settings = read_object(source / TOKENIZER_FILES[1])
        if "chat_template" not in settings and (source / TEMPLATE_FILE).exists():
            settings["chat_template"] = (source / TEMPLATE_FILE).read_text(encoding="utf-8")
        write_json(target / TOKENIZER_FILES[1], settings, indent=2)
        if not (source / TOKENIZER_FILES[0]).is_file():
            raise CheckpointError(f"{source / TOKENIZER_FILES[0]} is missing")
        copyfile(source / TOKENIZER_FILES[0], target / TOKENIZER_FILES[0])
        chat, rows = Chat.load(target), model_config_from(target).vocab_size
        if chat.vocab_size > rows:
            raise CheckpointError(f"it has {chat.vocab_size} tokens, the embedding {rows} rows")
        chat.prompt_tokens(Prompt("", "", "", "?"))
    except (CheckpointError, DataError, jinja2.TemplateError) as error:
        for name in TOKENIZER_FILES:
            (target / name).unlink(missing_ok=True)
        needed = " and ".join(TOKENIZER_FILES)
        print(
            f"no tokenizer taken: {error}. Stages need one: put fitting {needed} into {source}, import again"
        )
        return None
    return chat


if __name__ == "__main__":
    terminal.run(lambda: main(script_options.read(ImportOptions, sys.argv)))
