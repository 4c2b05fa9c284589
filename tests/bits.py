"""Whether two runs have made the same thing, to the last bit."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def same_bits(one: Path, other: Path, step: int) -> bool:
    """Weights, optimizer and loop state of two runs at a step."""
    first, second = (folder / "checkpoints" / f"step-{step}" for folder in (one, other))
    for path in sorted(first.glob("*.safetensors")):
        expected, found = load_file(path), load_file(second / path.name)
        if expected.keys() != found.keys():
            return False
        if not all(torch.equal(found[name], tensor) for name, tensor in expected.items()):
            return False
    states = sorted(path.relative_to(first) for path in first.rglob("*.pt"))
    assert states
    return all(same_state(first / path, second / path) for path in states)


def same_state(one: Path, other: Path) -> bool:
    first, second = (torch.load(path, weights_only=False) for path in (one, other))
    return equal(
        {k: v for k, v in first.items() if k != "loop"}, {k: v for k, v in second.items() if k != "loop"}
    )


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other) or type(one).__module__.startswith("deepspeed")
