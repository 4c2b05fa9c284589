"""Writes a checkpoint for others to use: what `r1pipe export` runs. No DeepSpeed here.

    python stages/export.py CHECKPOINT_FOLDER DIR

DIR gets the weights and config.json in the published format, the tokenizer with its chat template and the
sampling settings: transformers and vLLM load it as it is. It is read back and every tensor compared; where
transformers is installed, its model must give the same logits on the same tokens too.
"""

import importlib.util
import sys
from pathlib import Path
from shutil import copyfile

import torch

from r1pipe import checkpoints
from r1pipe.data.chat import TOKENIZER_FILES
from r1pipe.errors import CheckpointError, R1pipeError
from r1pipe.model import DeepseekV3, load_pretrained, save_pretrained

TOLERANCE = 1e-3  # of logits, in the checkpoint's own precision
TOKENS = 32


def main(source: Path, target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} is there already and not empty; give another folder")
    checkpoints.verify(source)
    model = load_pretrained(source).eval()
    target.mkdir(parents=True, exist_ok=True)
    save_pretrained(model, target)
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        copyfile(source / name, target / name)
    checkpoints.write_manifest(target)
    same_weights(model, load_pretrained(target))
    told = f"{target}: {sum(weights.numel() for weights in model.parameters()):,} parameters, read back alike"
    if importlib.util.find_spec("transformers"):
        told += f"; transformers' logits differ by {logits_apart(model, target):.1e} at most"
    print(told)


def same_weights(written: DeepseekV3, read: DeepseekV3) -> None:
    """Raises CheckpointError naming the first tensor that did not survive."""
    after = read.state_dict()
    for name, tensor in written.state_dict().items():
        if not torch.equal(tensor, after[name]):
            raise CheckpointError(f"tensor {name} is not the same after writing and reading; export again")


@torch.no_grad()
def logits_apart(model: DeepseekV3, folder: Path) -> float:
    """Largest difference of logits from transformers' model. Raises CheckpointError above TOLERANCE."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    generator = torch.Generator().manual_seed(0)
    tokens_BT = torch.randint(model.config.vocab_size, (2, TOKENS), generator=generator)
    other = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    logits_BTV = other(tokens_BT).logits
    apart = (model(tokens_BT) - logits_BTV).abs().max().item()
    if apart > TOLERANCE * max(1.0, logits_BTV.abs().max().item()):
        raise CheckpointError(f"{folder}: transformers computes other logits, {apart:.1e} apart")
    return apart


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]))
    except R1pipeError as error:
        print(f"r1pipe: {error}", file=sys.stderr)
        sys.exit(2)
