"""What a job imports, for the process that tests fork their jobs from: a fork starts in milliseconds."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"

import pyarrow.parquet

from r1pipe.doctor import examine  # imports every package of training
from r1pipe.rewards import language
from r1pipe.train.engine import patches

__all__ = ["examine", "pyarrow"]
patches.import_deepspeed()
language.language_share("The words of this sentence tell its language.", "en")  # reads its tables
