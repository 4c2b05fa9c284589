"""Held-out evaluation: pass@1, cons@k, greedy, format, language, length; general answers by the hidden truth.

drawing        draw -> score -> gather over ranks -> numbers
sampling       each rank's completions, kept in shards where a benchmark may take hours
asking         a benchmark's question, as its prompt asks it
verdicts       one scored completion, and the rows of evaluation.parquet
metrics        verdicts -> the numbers of evaluation.json; every score with the count behind it
contamination  a benchmark's questions in what its checkpoint was trained on
"""

from r1pipe.train.evaluation.drawing import Evaluation, evaluate, short
from r1pipe.train.evaluation.metrics import logged, measure, measure_general, summarise
from r1pipe.train.evaluation.verdicts import Verdict

__all__ = ["Evaluation", "Verdict", "evaluate", "logged", "measure", "measure_general", "short", "summarise"]
