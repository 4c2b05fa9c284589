"""The headers of safetensors files, read without torch."""

import json
import math
from pathlib import Path

from r1pipe.core.errors import ConfigError

LONGEST = 100_000_000  # bytes of a header, as the safetensors library has it


def weights_in(folder: Path) -> int:
    """How many numbers a folder's safetensors files hold. Raises ConfigError where there are none."""
    return sum(map(math.prod, shapes_in(folder).values()))


def shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what a folder's safetensors files hold. Raises ConfigError where there are none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        found = sorted({path.suffix for path in folder.glob("*") if path.suffix in (".bin", ".pth")})
        with_others = f", only {', '.join(found)}" if found else ""
        raise ConfigError(
            f"{folder} has no *.safetensors{with_others}; write the model with transformers' save_pretrained"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > LONGEST:
                    raise ValueError("its header is too long")
                header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            shapes |= {name: tuple(map(int, entry["shape"])) for name, entry in header.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is no safetensors file ({error}); copy it again") from None
    return shapes
