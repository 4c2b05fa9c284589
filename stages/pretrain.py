"""Pre-training: next-token prediction on packed documents, from random weights.

The result takes the place of DeepSeek-V3-Base, R1's start. It differs from V3's pre-training (section
4) in all but the objective's kind: no context extension, one batch size, and in the bundled recipe no
multi-token prediction (model.num_nextn_predict_layers=1 has it) and a corpus that a program writes.

    r1pipe run stage=pretrain
"""

import sys
from functools import partial
from itertools import islice

from r1pipe.config import PretrainConfig
from r1pipe.data.packing import PackedDocuments
from r1pipe.data.screening import Screening
from r1pipe.runs.files import write_json
from r1pipe.train.engine.engine import Engine
from r1pipe.train.finish import finish_stage
from r1pipe.train.loading import load_policy
from r1pipe.train.run import open_run
from r1pipe.train.sft.loop import train

SCREENED = 5000  # first documents that are looked over for claims and personal data; there is no end of them


def main(folder: str) -> None:
    with open_run(folder, PretrainConfig) as run:
        stage = run.stage
        chat, source = run.load_chat(), run.load_data()
        if run.rank == 0:
            screening = Screening(run.config.screening)
            screening.documents(islice(source.documents(run.seed("documents")), SCREENED))
            write_json(run.folder.screening, screening.report())
        model = load_policy(run)
        packed = PackedDocuments(
            source.documents(run.seed("documents")),
            chat.encode,
            order=partial(run.rng, "order"),
            length=stage.sequence_length,
            batch_size=stage.batch_size,
            progress=lambda done, total: run.progress("skip", done, total, "rows"),
        )
        engine = Engine(model, stage.optim, stage.router, run.config.engine, stage.max_steps)
        checkpoint = train(run, engine, packed.batches, stage.max_steps)
        finish_stage(run, engine, checkpoint)


if __name__ == "__main__":
    main(sys.argv[1])
