"""What one rank writes of a checkpoint: at once, or from a copy, in a thread while training goes on.

The files of both are the same: a copy keeps which tensors share memory, and of what.
"""

import copy
from collections.abc import Callable, Hashable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from r1pipe.core.errors import disk_is_full, no_room
from r1pipe.runs import heartbeat


class Writer:
    """The files that this rank writes into the checkpoint `folder`; `later`: from copies."""

    def __init__(self, folder: Path, later: bool = False):
        self.folder, self.later = folder, later
        self.paths: list[Path] = []  # of this rank's share of the state
        self.problem: str | None = None  # the disk is full; no rank may raise while others wait for it
        self._waiting: list[Callable[[], None]] = []
        self._copied: dict[Hashable, tuple[Any, Any]] = {}  # -> the original, kept alive; its copy

    def save(self, state_dict: Any, path: str) -> None:
        """For DeepSpeed: write what it would."""
        self.paths.append(Path(path))
        with heartbeat.working():
            if self.later:
                self.add(partial(self._write, self.copy(state_dict), path))
            else:
                self._write(state_dict, path)

    def add(self, write: Callable[[], None]) -> None:
        """Something else to write: at once, or in `write_copies`."""
        if self.later:
            self._waiting.append(write)
        else:
            write()

    def copies_of(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Tensors by name, for `add`."""
        return ((name, self.copy(tensor) if self.later else tensor) for name, tensor in tensors)

    def all_copied(self) -> None:
        """The originals are free from now on."""
        self._copied.clear()

    def write_copies(self) -> None:
        """Write, and free, what was copied; for a thread beside training. Sets `problem`."""
        while self._waiting and self.problem is None:
            self._waiting.pop(0)()

    def _write(self, content: Any, path: str) -> None:
        def write() -> None:
            # our own file object: torch's hides why it could not be written
            with heartbeat.to_write(path) as file:
                torch.save(content, file)

        self.attempt(write, path)

    def attempt(self, write: Callable[[], None], path: Path | str) -> None:
        """Write something, unless the disk is full; sets `problem` where it is now."""
        if self.problem is not None:
            return
        try:
            write()
        except (OSError, RuntimeError, SafetensorError) as error:
            if not disk_is_full(error):
                raise
            self.problem = no_room(f"{path} is incomplete", self.folder)

    def copy(self, value: Any) -> Any:
        """A copy in the CPU's memory of dicts, lists, tuples and tensors; anything else is taken as it is."""
        if isinstance(value, Tensor):
            return self._once(id(value), value, self._copy_tensor)
        if isinstance(value, dict | list):
            return self._once(id(value), value, self._copy_container)
        if type(value) is tuple:
            return self._once(id(value), value, lambda parts: tuple(map(self.copy, parts)))
        return value

    def _once(self, key: Hashable, value: Any, make: Callable[[Any], Any]) -> Any:
        if key not in self._copied:
            self._copied[key] = value, make(value)
        return self._copied[key][1]

    def _copy_container(self, value: Any) -> Any:
        made = copy.copy(value)  # with its type and attributes
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            made[key] = self.copy(part)
        return made

    def _copy_tensor(self, value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        key = "memory", storage.data_ptr() or id(value)  # what is empty has no address
        copied = self._once(key, storage, lambda of: of.clone() if of.device.type == "cpu" else of.cpu())
        heartbeat.tick()
        made = torch.empty(0, dtype=value.dtype)
        made.set_(copied, value.storage_offset(), value.size(), value.stride())
        if isinstance(value, nn.Parameter):
            made = nn.Parameter(made, value.requires_grad)
        elif value.requires_grad:
            made.requires_grad_()
        made.__dict__.update({name: self.copy(part) for name, part in vars(value).items()})
        return made
