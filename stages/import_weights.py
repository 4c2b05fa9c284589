"""Takes a published checkpoint in: what `r1pipe import` runs. No DeepSpeed here.

    python stages/import_weights.py OPTIONS_FILE     the JSON of r1pipe.config.script_options.ImportOptions

The folder holds safetensors (with an index or in one file; BF16, F32, F16 or FP8 with its scales) under
DeepSeek's names, and config.json. Every tensor is checked and passes through one by one, with the bits that
it has unless `dtype` says otherwise; FP8 is dequantised when a job loads it. `target` becomes a checkpoint as
the stages write them. MTP layers travel along; the stages do not train them.
"""

import json
import sys
from pathlib import Path

import jinja2

from r1pipe.chat.template import TOKENIZER_FILES, Chat
from r1pipe.config import script_options
from r1pipe.config.script_options import ImportOptions
from r1pipe.core import terminal
from r1pipe.core.errors import CheckpointError
from r1pipe.core.types import Prompt
from r1pipe.model import model_config_from
from r1pipe.model.names import layer_of
from r1pipe.model.reading import Stored
from r1pipe.model.weights import GENERATION, convert
from r1pipe.runs import checkpoints
from r1pipe.runs.jsonfile import read_object

TEMPLATE_FILE = "chat_template.jinja"  # where newer transformers put what tokenizer_config.json used to hold


def main(options: ImportOptions) -> None:
    source, target = options.folder, options.target
    if target.exists():
        raise CheckpointError(f"{target} is there already; give another --name, or remove it")
    must_stay_inside(source)
    with checkpoints.whole(target) as unfinished:
        stored = convert(source, unfinished, options.dtype, int(options.shard_gb * 1e9))
        take_generation(source, unfinished, take_tokenizer(source, unfinished))
    size = f"{stored.parameters:,} parameters in {len(stored.names()):,} tensors"
    print(f"{target}: {size} ({types_of(Stored(target))})")
    layers = model_config_from(target).num_hidden_layers
    if any(layer_of(name) >= layers for name in stored.entries):
        print("its MTP layers travel along: pre-training and SFT train them, sampling does not use them")


def must_stay_inside(source: Path) -> None:
    """Raises CheckpointError on a file that is a link out of the folder.

    Hugging Face's cache is made of links, from snapshots/REVISION to blobs/: those may be followed.
    """
    home = source.resolve()
    allowed = [home, *(parent / "blobs" for parent in home.parents[1:2])]
    for path in sorted(source.iterdir()) if source.is_dir() else []:
        if not any(path.resolve().is_relative_to(place) for place in allowed):
            raise CheckpointError(f"{path} links to {path.resolve()}, out of its folder; copy the file there")


def types_of(stored: Stored) -> str:
    return ", ".join(sorted({stored.entries[name].dtype for name in stored.names()}))


def take_tokenizer(source: Path, target: Path) -> Chat | None:
    """Copy tokenizer and chat template where r1pipe can speak them; otherwise say why not, and go on."""
    try:
        settings = read_object(source / TOKENIZER_FILES[1])
        if "chat_template" not in settings and (source / TEMPLATE_FILE).exists():
            settings["chat_template"] = (source / TEMPLATE_FILE).read_text(encoding="utf-8")
        (target / TOKENIZER_FILES[1]).write_text(
            json.dumps(settings, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
        )
        if not (source / TOKENIZER_FILES[0]).is_file():
            raise CheckpointError(f"{source / TOKENIZER_FILES[0]} is missing")
        (target / TOKENIZER_FILES[0]).write_bytes((source / TOKENIZER_FILES[0]).read_bytes())
        chat, rows = Chat.load(target), model_config_from(target).vocab_size
        if chat.vocab_size > rows:
            raise CheckpointError(f"it has {chat.vocab_size} tokens, the embedding {rows} rows")
        chat.prompt_tokens(Prompt("", "", "", "?"))
    except (CheckpointError, jinja2.TemplateError) as error:
        for name in TOKENIZER_FILES:
            (target / name).unlink(missing_ok=True)
        needed = " and ".join(TOKENIZER_FILES)
        print(
            f"no tokenizer taken: {error}. Stages need one: put fitting {needed} into {source}, import again"
        )
        return None
    return chat


def take_generation(source: Path, target: Path, chat: Chat | None) -> None:
    """generation_config.json as it is; without one, the special tokens of tokenizer or config.json."""
    if (source / GENERATION).exists():
        content = read_object(source / GENERATION)
    elif chat is not None:
        content = {"bos_token_id": chat.bos_id, "eos_token_id": chat.eos_id, "pad_token_id": chat.pad_id}
    else:
        content = {
            key: value
            for key, value in read_object(source / "config.json").items()
            if key.endswith("_token_id")
        }
    (target / GENERATION).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    terminal.run(lambda: main(script_options.read(ImportOptions, sys.argv)))
