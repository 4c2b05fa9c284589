"""Pre-training: next-token prediction on packed documents, from random weights.

What it makes stands in for DeepSeek-V3-Base, R1's starting point. It differs from V3's pre-training (section
4) in all but the objective's kind: no context extension, one batch size, and in the bundled recipe no
multi-token prediction (model.num_nextn_predict_layers=1 has it) and a corpus that a program writes.

    r1pipe run stage=pretrain
    deepspeed --num_accelerators 2 --no_local_rank stages/pretrain.py RUN_FOLDER
"""

import sys
from collections.abc import Iterator
from itertools import islice

from r1pipe.chat.template import Chat
from r1pipe.config import PretrainConfig
from r1pipe.data.packing import Packed, pack, split_long
from r1pipe.data.source import Source
from r1pipe.train.engine.engine import Engine
from r1pipe.train.finish import finish_stage, quick_evaluation
from r1pipe.train.run import Run, open_run
from r1pipe.train.sft.loop import Batches, train

BLOCK = 1024  # documents packed together: enough for rows with hardly any padding


def main(folder: str) -> None:
    with open_run(folder, PretrainConfig) as run:
        stage = run.stage
        chat = run.load_chat()
        source = run.load_data()
        model = run.load_model(run.config.weights_from)
        engine = Engine(model, stage.optim, stage.router, run.config.engine, stage.max_steps)
        checkpoint = train(
            run,
            engine,
            packed_documents(run, source, chat),
            stage.max_steps,
            chat.pad_id,
            lambda: quick_evaluation(run, engine, chat, source),
        )
        finish_stage(run, engine, chat, source, checkpoint, stage.max_steps)


def packed_documents(run: Run[PretrainConfig], source: Source, chat: Chat) -> Batches:
    """Endless batches of packed documents; a resumed run makes the earlier ones again and skips them."""

    def rows() -> Iterator[Packed]:
        documents = source.documents(run.seed("documents"))
        for block in range(sys.maxsize):
            texts = islice(documents, BLOCK)
            pieces = (
                piece for text in texts for piece in split_long(chat.encode(text), run.stage.sequence_length)
            )
            packed, _ = pack(pieces, run.stage.sequence_length)
            yield from (packed[i] for i in run.rng("order", block).permutation(len(packed)))

    def batches(step: int) -> Iterator[list[Packed]]:
        size = run.stage.batch_size
        stream = islice(rows(), step * size, None)
        while batch := list(islice(stream, size)):
            yield batch

    return batches


if __name__ == "__main__":
    main(sys.argv[1])
