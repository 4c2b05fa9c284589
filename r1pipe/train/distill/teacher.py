"""A teacher that is read while the student trains: what it thinks of tokens, never what it would say.

Axes: B rows, T tokens, N learned tokens, D the teacher's hidden width.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from r1pipe.chat.template import Chat
from r1pipe.config import EngineConfig, ParentRef
from r1pipe.core.errors import CheckpointError
from r1pipe.data.packing import Batch
from r1pipe.model import Policy
from r1pipe.model.logprobs import Head
from r1pipe.train.engine import patches
from r1pipe.train.engine.frozen import FrozenModel
from r1pipe.train.engine.passes import Pass
from r1pipe.train.loading import load_frozen
from r1pipe.train.run import Run
from r1pipe.train.sft.loop import learned, read


class FrozenTeacher:
    """A frozen model with the student's tokenizer, read along the student's rows. All ranks call."""

    def __init__(self, model: Policy, config: EngineConfig):
        model.drop_mtp()
        self.frozen = FrozenModel(model, config)
        self.head = whole_head(self.frozen)

    def hidden(self, batches: Sequence[Batch]) -> list[Tensor]:
        """hidden_ND before every learned token of each of this rank's micro-batches: much smaller than
        logits, which `head` makes of a few at a time."""
        model = self.frozen.module
        reading = partial(read, with_balance=False)
        return self.frozen.evaluate([Pass(model, batch, reading, _learned_alone) for batch in batches])


def _learned_alone(model: Policy, batch: Batch, hidden_BTD: Tensor, balances: Any) -> tuple[Tensor, None]:
    return learned(batch, hidden_BTD)[0], None


def whole_head(frozen: FrozenModel) -> Head:
    """The model's head, usable outside its passes: at ZeRO level 3 a copy on each rank."""
    head = frozen.module.lm_head
    if frozen.zero_level < 3:
        return head
    copy = Head.sharing(head)
    copy.compiled, copy.fp32 = head.compiled, head.fp32
    shared = [tensor for tensor in (head.weight, head.bias) if tensor is not None]
    with patches.whole(shared):
        own = [nn.Parameter(tensor.detach().clone(), requires_grad=False) for tensor in shared]
    copy.weight = own[0]
    if head.bias is not None:
        copy.bias = own[1]
    return copy


def load_teacher(run: Run[Any], parent: ParentRef) -> Policy:
    """The teacher's model, to be frozen. Raises CheckpointError where it cannot read the student's tokens."""
    teacher = Chat.load(Path(parent.checkpoint), run.config.chat.system)
    for what, ours, theirs in (
        ("tokenizer", run.chat.tokenizer_hash, teacher.tokenizer_hash),
        ("chat template", run.chat.template_hash, teacher.template_hash),
    ):
        if ours != theirs:
            raise CheckpointError(
                f"teacher={parent.checkpoint} has another {what} than the student, whose tokens it is to "
                "read; take a teacher with the same, or give stage.transfer=sft or ranking, which learn from "
                "its text"
            )
    return load_frozen(run, parent)
