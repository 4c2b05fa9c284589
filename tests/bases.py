"""The bundled base in another precision than it is stored in."""

import shutil
from pathlib import Path

from r1pipe.core.paths import content_dir
from r1pipe.model.weights import convert
from r1pipe.runs.checkpoints import write_manifest


def base_in_float32(folder: Path) -> Path:
    """A copy whose answers do not depend on what is drawn beside them: in bfloat16 near ties turn."""
    stored = shutil.ignore_patterns("model.safetensors", "config.json", "manifest.json")
    shutil.copytree(content_dir() / "base", folder, ignore=stored)
    convert(content_dir() / "base", folder, "float32")
    write_manifest(folder)
    return folder
