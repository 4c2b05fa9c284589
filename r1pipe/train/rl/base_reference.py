"""The reference of a policy with adapters: the same model without them, and no second copy of it."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from r1pipe.model.hf import lora
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.writing import Writer
from r1pipe.train.rl.batch import MicroBatch
from r1pipe.train.rl.update import Reference, completion_logprobs


class BaseReference(Reference):
    """The policy without its adapters or, once they have replaced the reference, with earlier ones."""

    def __init__(self, engine: Engine):
        """`engine` holds the policy."""
        self.engine, self.device = engine, engine.device
        self.adapter: dict[str, Tensor] | None = None  # None: without

    @torch.no_grad()
    def logprobs(self, micros: Sequence[MicroBatch], temperature: float) -> list[Tensor]:
        with self.engine.gathered() as policy, lora.instead(policy.whole, self.adapter):
            training = policy.training
            policy.eval()
            try:
                return [completion_logprobs(policy, micro, temperature) for micro in micros]
            finally:
                policy.train(training)

    def replace_by(self, engine: Engine) -> None:
        with engine.gathered() as policy:
            self.adapter = {name: w.detach().clone() for name, w in lora.weights(policy.whole).items()}

    def save(self, folder: Path, state: dict[str, Any], writer: Writer) -> None:
        assert self.adapter is not None
        if self.engine.rank == 0:
            write = partial(lora.write, self.engine.module.adapter, self.adapter, folder)
            writer.attempt(write, folder)

    def load(self, folder: Path) -> None:
        self.adapter = lora.read(folder)
