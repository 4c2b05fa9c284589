"""A file that must hold one JSON object: read whole, or refused in one line."""

import json
from pathlib import Path
from typing import Any

from r1pipe.core.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """For what may be missing: the file's JSON object, {} where it is missing or damaged."""
    try:
        return read_object(path)
    except CheckpointError:
        return {}


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint or run folder. Raises CheckpointError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; is this a checkpoint folder?") from None
    except NotADirectoryError:
        raise CheckpointError(f"{path.parent} is a file; give the folder of a checkpoint") from None
    except RecursionError:
        raise CheckpointError(f"{path} is nested too deeply; copy the checkpoint again") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise CheckpointError(f"{path} is not valid JSON ({error}); copy the checkpoint again") from None
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); copy the checkpoint again"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(content).__name__}")
    return content
