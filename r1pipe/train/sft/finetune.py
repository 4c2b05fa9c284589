"""What every SFT stage does with its demonstrations: pack, train, evaluate, write the record."""

from collections.abc import Sequence
from typing import TypeVar

from r1pipe.chat.template import Chat
from r1pipe.config import FineTuneConfig
from r1pipe.core.errors import DataError
from r1pipe.core.types import Demonstration
from r1pipe.data.packing import Packed, pack
from r1pipe.data.source import Source
from r1pipe.train.engine.engine import Engine
from r1pipe.train.finish import finish_stage, quick_evaluation
from r1pipe.train.run import Run, log
from r1pipe.train.sft.loop import epochs_of, steps_in, train

F = TypeVar("F", bound=FineTuneConfig)


def fine_tune(
    run: Run[F], chat: Chat, source: Source, demonstrations: Sequence[Demonstration], data_hash: str
) -> None:
    """Train on the responses for the stage's epochs, from packing to record.

    Raises DataError if no demonstration fits a row.
    """
    stage = run.stage
    rows = pack_demonstrations(chat, demonstrations, stage.sequence_length)
    steps = steps_in(len(rows), stage.batch_size, stage.epochs, stage.max_steps)
    model = run.load_model(run.config.weights_from)
    engine = Engine(model, stage.optim, stage.router, run.config.engine, steps)
    batches = epochs_of(run, rows, stage.batch_size)
    checkpoint = train(
        run, engine, batches, steps, chat.pad_id, lambda: quick_evaluation(run, engine, chat, source)
    )
    finish_stage(run, engine, chat, source, checkpoint, steps, data_hash)


def pack_demonstrations(chat: Chat, demonstrations: Sequence[Demonstration], length: int) -> list[Packed]:
    """Rows of packed examples whose loss covers the responses alone. Raises DataError if there are none."""
    if not demonstrations:
        raise DataError("this data has no worked solutions to train on; name another with data=NAME")
    examples = (
        chat.example(demonstration.prompt, demonstration.response) for demonstration in demonstrations
    )
    rows, dropped = pack(examples, length)
    if not rows:
        raise DataError(
            f"each of the {dropped} examples is longer than stage.sequence_length={length}; raise it"
        )
    kept, learned = len(demonstrations) - dropped, sum(row.learned for row in rows)
    log.info(
        f"{kept} demonstrations in {len(rows)} rows of {length} tokens, {learned} tokens learned; "
        f"{dropped} demonstrations are too long"
    )
    return rows
