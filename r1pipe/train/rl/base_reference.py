"""The reference of a policy with adapters: the same model without them, and no second copy of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from r1pipe.model.hf import lora
from r1pipe.train.engine.engine import Engine
from r1pipe.train.rl.update import Reference


class BaseReference(Reference):
    """The policy without its adapters or, once they have replaced the reference, with earlier ones."""

    def __init__(self, engine: Engine):
        """`engine` holds the policy."""
        self.engine, self.model, self.device = engine, engine.module, engine.device
        self.adapter: dict[str, Tensor] | None = None  # None: without

    @contextmanager
    def ready(self) -> Iterator[None]:
        with self.engine.gathered() as policy, lora.instead(policy.whole, self.adapter):
            training = policy.training
            policy.eval()
            try:
                yield
            finally:
                policy.train(training)

    def replace_by(self, engine: Engine) -> None:
        with engine.gathered() as policy:
            self.adapter = {name: w.detach().clone() for name, w in lora.weights(policy.whole).items()}

    def save(self, folder: Path) -> None:
        assert self.adapter is not None
        lora.write(self.model.adapter, self.adapter, folder)

    def load(self, folder: Path) -> None:
        self.adapter = lora.read(folder)
