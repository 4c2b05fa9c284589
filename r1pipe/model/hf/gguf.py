"""A GGUF file as a folder in Hugging Face's format: `python -m r1pipe.model.hf.gguf FILE FOLDER`.

transformers reads the file: weights are taken out of their blocks (a quantised file gives the numbers that
its blocks stand for, in float32), and the tokenizer, its special tokens and the chat template are built from
the metadata. The command line starts this once for each file, in a process of its own, since it imports
neither torch nor transformers.
"""

import sys
from pathlib import Path
from typing import Any

from r1pipe.core import terminal
from r1pipe.core.errors import CheckpointError

SHARD = "5GB"  # as the other folders' shards


def convert(file: Path, folder: Path) -> None:
    """Write safetensors, config.json, generation_config.json, the tokenizer and its template into `folder`.

    Raises CheckpointError, one line, where transformers does not know the architecture or cannot read the
    file, and where there is no chat template.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, local_files_only=True)
        model, problems = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype="auto", local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, ImportError) as error:
        line = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{file}: transformers cannot read this GGUF file ({line}); give another one, or "
            "the model's safetensors"
        ) from None
    if not tokenizer.chat_template:
        raise CheckpointError(
            f"{file} has no chat template (tokenizer.chat_template); give the GGUF file of the model's "
            "chat version"
        )
    _check_complete(file, problems)
    _as_plain(model)
    model.save_pretrained(folder, max_shard_size=SHARD)
    tokenizer.save_pretrained(folder)


def _check_complete(file: Path, problems: dict[str, Any]) -> None:
    """Raises CheckpointError where tensors are missing: transformers would draw them at random."""
    for kind in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, problems[kind])):
            raise CheckpointError(
                f"{file}: {names[0]} and {len(names) - 1} other tensors are {kind.removesuffix('_keys')}; "
                "give another GGUF file"
            )


def _as_plain(model: Any) -> None:
    """Drop what says that the weights are still in blocks; transformers saves no such model."""
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False


if __name__ == "__main__":
    terminal.run(lambda: convert(Path(sys.argv[1]), Path(sys.argv[2])))
