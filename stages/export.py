"""Writes a checkpoint for others to use: what `r1pipe export` runs. No DeepSpeed here.

    python stages/export.py OPTIONS_FILE     the JSON of r1pipe.config.script_options.ExportOptions

Writes weights and config.json in the published format, the tokenizer with its chat template and the sampling
settings: transformers and vLLM can load the folder. Tensors are converted one by one and read back bit by
bit. If this machine's memory can hold the model in float32, the logits of a few tokens are compared before
and after, and with transformers'.
"""

import sys
from pathlib import Path
from shutil import copyfile

import psutil
import torch
from torch import Tensor

from r1pipe.chat.template import TOKENIZER_FILES
from r1pipe.config import script_options
from r1pipe.config.script_options import ExportOptions
from r1pipe.core import terminal
from r1pipe.core.chat_template import split_system, with_system
from r1pipe.core.errors import CheckpointError, ConfigError
from r1pipe.core.safetensors import weights_in
from r1pipe.model import load_pretrained
from r1pipe.model.hf import files as hf_files
from r1pipe.model.policy import of_transformers
from r1pipe.model.reading import GENERATION, Stored
from r1pipe.model.saving import tensors_of
from r1pipe.model.weights import PRECISIONS, convert
from r1pipe.runs import checkpoints
from r1pipe.runs.files import read_object, write_json

TOLERANCE = 1e-4  # of logits in float32, as a share of the largest
TOKENS = 32
COPIES = 2  # of the model in float32 that must fit into free memory, for the logits to be compared


def main(options: ExportOptions) -> None:
    source, target = options.checkpoint, options.folder
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} is there already and not empty; give another folder")
    checkpoints.verify(source)
    if of_transformers(source):
        export_hf(options)
        return
    with checkpoints.whole(target) as unfinished:
        stored = convert(source, unfinished, options.dtype, int(options.shard_gb * 1e9))
        for name in (*TOKENIZER_FILES, GENERATION):
            if (source / name).exists():
                copyfile(source / name, unfinished / name)
            else:
                print(f"{source} has no {name}, so {target} has none")
        renew_template(unfinished)
        comparison = compare_logits(source, unfinished, stored.parameters, exact=options.dtype is None)
    print(f"{target}: {stored.parameters:,} parameters, every tensor read back bit by bit; {comparison}")


def export_hf(options: ExportOptions) -> None:
    """The same for a model of transformers: its files as they are, or cast by transformers."""
    source, target = options.checkpoint, options.folder
    if options.dtype == "fp8":
        raise ConfigError("--dtype fp8 is for the bundled model; give float32 or bfloat16")
    with checkpoints.whole(target) as unfinished:
        checkpoints.copy_published(source, unfinished)
        if options.dtype is not None:
            for path in unfinished.glob("*.safetensors*"):
                path.unlink()
            cast = hf_files.load(source).to(PRECISIONS[options.dtype])
            hf_files.write(cast, tensors_of(cast), unfinished, int(options.shard_gb * 1e9))
        parameters = weights_in(unfinished)
        comparison = compare_logits(source, unfinished, parameters, exact=options.dtype is None)
    print(f"{target}: {parameters:,} parameters; {comparison}")


def renew_template(target: Path) -> None:
    """The chat template as this version writes it; tells of its system prompt."""
    path = target / TOKENIZER_FILES[1]
    settings = read_object(path) if path.exists() else {}
    template = settings.get("chat_template")
    if isinstance(template, str):
        bare, system = split_system(template)
        write_json(path, settings | {"chat_template": with_system(bare, system)}, indent=2)
        if system:
            print(f"the chat template has the system prompt {system!r}")


def compare_logits(source: Path, target: Path, parameters: int, exact: bool) -> str:
    """One line on the differences, or that there is too little memory to compute them. Raises CheckpointError
    if they are too large."""
    needed = COPIES * 4 * parameters
    if needed >= psutil.virtual_memory().available:
        return f"no logits compared: that takes {needed / 1e9:.0f} GB of memory"
    before, after = logits(source), logits(target)
    apart = (before - after).abs().max().item()
    largest = before.abs().max().item()
    if not apart <= (0 if exact else largest):
        raise CheckpointError(f"{target}: logits are {apart:.1e} apart from those of {source}; export again")
    line = "logits are the same" if exact else f"logits moved by {apart:.1e} (the largest is {largest:.1e})"
    written = Stored(target)
    if any(map(written.is_fp8, written.entries)):
        return line  # transformers runs FP8 on accelerators only
    apart = (after - logits_of_transformers(target)).abs().max().item()
    if not apart <= TOLERANCE * max(1.0, largest):
        raise CheckpointError(f"{target}: transformers computes other logits, {apart:.1e} apart")
    return f"{line}; transformers' differ by {apart:.1e} at most"


def tokens_BT(vocabulary: int) -> Tensor:
    return torch.randint(vocabulary, (2, TOKENS), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    model = load_pretrained(folder).float().eval()
    return model(tokens_BT(model.config.vocab_size))


@torch.no_grad()
def logits_of_transformers(folder: Path) -> Tensor:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model(tokens_BT(model.config.vocab_size)).logits


if __name__ == "__main__":
    terminal.run(lambda: main(script_options.read(ExportOptions, sys.argv)))
