"""Run by test_footprint.py in a process of its own: the most memory that a stage takes, with the estimate.

    python tests/adapters_memory.py FOLDER STAGE [OVERRIDES]...

FOLDER has a model in `small`, whose run brings in what a first step needs, and one in `model`. What glibc
keeps of freed memory counts; with MALLOC_MMAP_THRESHOLD_=1000000 it gives large blocks back at once.
"""

import json
import sys
import threading
from pathlib import Path

import pyarrow.parquet as pq
import torch
from jobs import write_run
from tiny_runs import load_stage

from r1pipe.chat.template import Chat
from r1pipe.config import RunConfig
from r1pipe.config.compose import compose
from r1pipe.core.types import Prompt
from r1pipe.launch.parents import with_parents
from r1pipe.plan import footprint
from r1pipe.runs import heartbeat

MEBIBYTE = 2**20
TOKENS = 512  # of a training pass
WORDS = [
    *("recipe=smoke", "model=hf", "data=world", "tracking=none", "engine.ranks=1", "engine.threads=1"),
    *("stage.max_steps=2", "stage.save_every=0", "stage.eval.every=0", "stage.eval.problems=0"),
    *("stage.eval.general=0", "model.max_position_embeddings=256"),
]
OF_STAGE = {
    "cold_start": ["stage.batch_size=2", "stage.sequence_length=256"],
    "grpo": [
        *(f"stage.max_tokens_per_micro_batch={TOKENS}", "stage.sampling.max_tokens=32", "stage.kl_coef=0.1"),
        *("stage.prompts_per_step=4", "stage.group_size=8", "stage.reference_every=0", "stage.minibatches=1"),
        "stage.sampling.max_num_seqs=8",
    ],
}


def resident() -> float:
    """MiB of this process, with a model's file as far as it is read in place."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def go(root: Path, model: str, stage: str, words: list[str]) -> RunConfig:
    paths = [f"root={root / 'runs'}", f"model.path={root / model}", f"parent={root / model}"]
    config = with_parents(compose([f"stage={stage}", *WORDS, *OF_STAGE[stage], *paths, *words]).config)
    folder = write_run(root / "runs" / "-".join([model, stage, *words]), config)
    load_stage(stage).main(str(folder))
    return config


def longest_prompt(root: Path) -> int:
    """Tokens of the longest prompt that the model's run has asked; 0 if it has asked none."""
    chat, sizes = Chat.load(root / "model"), [0]
    for path in (root / "runs").glob("model-*/rollouts/*.parquet"):
        for row in pq.read_table(path).to_pylist():
            prompt = Prompt(row["prompt_id"], row["task"], row["language"], row["question"])
            sizes.append(len(chat.prompt_tokens(prompt)))
    return max(sizes)


def main(root: Path, stage: str, words: list[str]) -> None:
    """Print the MiB of the estimate, and the most that there were in each phase beside what was there."""
    torch.set_num_threads(1)
    go(root, "small", stage, words)
    before, most, done = resident(), dict[str, float](), threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            heart = heartbeat._heart
            place = heart.beat.place if heart else "outside"
            most[place] = max(most.get(place, 0.0), resident() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    config = go(root, "model", stage, words)
    done.set()
    thread.join()
    need = footprint.needed(config, longest_prompt(root))
    told = {"estimate": need.peak / MEBIBYTE, "states": need.states / MEBIBYTE, "parts": need.parts()}
    print(json.dumps({**told, "found": most}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
