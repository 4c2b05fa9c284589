"""One job's run folder: config in; metrics, progress, checkpoints and the record out.

`with open_run(folder) as run:` is the frame of every stage script. Rank 0 writes; all ranks call.
"""

import hashlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from r1pipe import checkpoints
from r1pipe.config import read_config
from r1pipe.config.schema import ParentRef, RunConfig, StageConfig
from r1pipe.data.chat import Chat
from r1pipe.errors import CheckpointError, ConfigError, R1pipeError
from r1pipe.model import DeepseekV3, load_pretrained
from r1pipe.paths import RunFolder
from r1pipe.provenance import job_record, write_json
from r1pipe.ranks import leave_with, rank_and_world
from r1pipe.resumable import Resumable

PROGRESS_EVERY_S = 0.25  # seconds between progress lines of the same kind

log = logging.getLogger("r1pipe")
S = TypeVar("S", bound=StageConfig)


class Run(Resumable[S]):
    """What a stage script needs of its run folder. Made by `open_run`."""

    def __init__(self, folder: RunFolder, config: RunConfig, stage: S):
        super().__init__(folder, config, stage)
        self._progressed: dict[str, float] = {}
        for place in (folder.checkpoints, folder.data):
            place.mkdir(parents=True, exist_ok=True)
        self.seconds["starting"] = self.elapsed()

    # --- randomness: named, seeded streams, never the global one

    def seed(self, stream: str, step: int = 0) -> int:
        """A seed of 63 bits that depends on the run's seed, the stream's name and the step alone."""
        digest = hashlib.sha256(f"{self.config.seed}/{stream}/{step}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    def rng(self, stream: str, step: int = 0) -> np.random.Generator:
        return np.random.default_rng(self.seed(stream, step))

    def generator(self, stream: str, step: int = 0) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed(stream, step))

    # --- what is shown while it runs

    def progress(self, what: str, done: int, total: int, unit: str, **show: float) -> None:
        """Say how far a piece of work is; cheap enough to call in every round of a loop."""
        now = time.monotonic()
        if done < total and now - self._progressed.get(what, 0.0) < PROGRESS_EVERY_S:
            return
        self._progressed[what] = now
        self.tell(what=what, done=done, total=total, unit=unit, show=show)

    # --- what it starts from

    def load_model(self, parent: ParentRef | None) -> DeepseekV3:
        """The parent's model, its files checked against their hashes; without a parent random weights."""
        if parent is None:
            return DeepseekV3(self.config.model, self.generator("weights"))
        if self.rank == 0:
            checkpoints.verify(parent.checkpoint, parent.hash)
        return load_pretrained(parent.checkpoint)

    def load_chat(self) -> Chat:
        """The tokenizer and chat template that came with the weights.

        Raises CheckpointError where a checkpoint that is read besides speaks another format.
        """
        chat = Chat.load(self._tokenizer_folder())
        for stage, parent in self.config.reads_from.items():
            other = Chat.load(parent.checkpoint)
            if (other.template_hash, other.tokenizer_hash) != (chat.template_hash, chat.tokenizer_hash):
                raise CheckpointError(
                    f"{parent.checkpoint} (stage {stage}) has another tokenizer or chat template than "
                    f"{self._tokenizer_folder()}; take both from one pipeline"
                )
        return chat

    # --- the end

    def finish(
        self,
        checkpoint: Path,
        chat: Chat,
        evaluation: dict[str, Any],
        samples: list[dict[str, Any]],
        data_hash: str | None,
        steps: int,
    ) -> None:
        """Write evaluation.json, samples.json and, last, record.json: its presence means done."""
        if self.rank != 0:
            return
        write_json(self.folder.evaluation, evaluation)
        write_json(self.folder.samples, samples)
        wall_s, seconds = round(self.elapsed(), 3), {k: round(v, 3) for k, v in self.seconds.items()}
        made = {
            "wall_s": wall_s,
            "seconds": seconds,
            "steps": steps,
            "data_hash": data_hash,
            "metrics": evaluation,
        }
        write_json(self.folder.record, job_record(self.folder, self.config, checkpoint, chat, made))
        log.info("done in %.0f s", self.elapsed())


@contextmanager
def open_run(path: Path | str, kind: type[S] = StageConfig) -> Iterator[Run[S]]:  # type: ignore[assignment]
    """The frame of a stage script: reads config.json, sets threads and logging, and turns a user's error into
    one line of error.txt and exit code 2."""
    folder = RunFolder(Path(path).resolve())
    rank, _ = rank_and_world()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    log.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    try:
        config = read_config(folder.config)
        torch.set_num_threads(_threads(config))
        if not isinstance(config.stage, kind):
            raise ConfigError(f"{folder.config} is for {config.stage.script}, not for {sys.argv[0]}")
        run = Run(folder, config, config.stage)
        log.info("%s: stage %s, rank %d of %d", folder.run_id, run.stage.name, run.rank, run.world_size)
        yield run
        leave_with(0)
    except R1pipeError as error:
        log.error("%s", error)
        _first_writes(folder.error, f"{error}\n")
        leave_with(2)
        raise SystemExit(2) from None


def _threads(config: RunConfig) -> int:
    """CPU threads of this rank: as configured, or the cores divided by the ranks."""
    return config.engine.threads or max(1, len(os.sched_getaffinity(0)) // config.engine.ranks)


def _first_writes(path: Path, text: str) -> None:
    """Ranks may fail together, and a rank other than 0 alone: the first one tells."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        pass
