"""A checkpoint that answers outside of any run: its model on this machine, and its own sampler."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from r1pipe.config.fields import NonNegative, Strict, build
from r1pipe.core.errors import CheckpointError, ConfigError
from r1pipe.model import Policy, load_pretrained
from r1pipe.model.reading import GENERATION
from r1pipe.runs.files import read_object
from r1pipe.train.engine.ranks import choose_device


@dataclass(frozen=True)
class DrawingDefaults(Strict):
    """How a checkpoint's answers are drawn unless somebody says otherwise."""

    temperature: NonNegative = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0


def load(folder: Path, accelerator: str = "auto") -> Policy:
    """The model on the GPU in bfloat16, or else on the CPU as stored. Raises CheckpointError."""
    device = choose_device(accelerator)
    model = load_pretrained(folder).eval().requires_grad_(False)
    return model if device.type == "cpu" else model.bfloat16().to(device)


def drawing_defaults(folder: Path) -> DrawingDefaults:
    """Those of generation_config.json. Raises CheckpointError for values that cannot be."""
    path = folder / GENERATION
    found = read_object(path) if path.exists() else {}
    given = {key: found[key] for key in ("temperature", "top_p") if found.get(key) is not None}
    try:
        return build(DrawingDefaults, given)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
