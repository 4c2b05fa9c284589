"""A benchmark's question, as the prompt of its file in conf/benchmark/ asks it."""

import re
from dataclasses import replace

from r1pipe.config.benchmark import OPTIONS, QUESTION, BenchmarkConfig
from r1pipe.core.types import Prompt
from r1pipe.data.answers import listed

_PLACES = re.compile("|".join(map(re.escape, (QUESTION, OPTIONS))))


def with_benchmark_prompt(prompt: Prompt, benchmark: BenchmarkConfig) -> Prompt:
    """The prompt with its question put into the benchmark's; id, gold answer and checker stay.

    Where the benchmark has a place for the options, they leave the question and are written in its way.
    """
    options, question = prompt.checker.get("options", {}), prompt.question
    if OPTIONS in benchmark.prompt:
        question = question.removesuffix(f"\n{listed(options)}")
    lines = (
        benchmark.option.replace("{letter}", letter).replace("{text}", text)
        for letter, text in options.items()
    )
    texts = {QUESTION: question, OPTIONS: "\n".join(lines)}
    return replace(prompt, question=_PLACES.sub(lambda place: texts[place[0]], benchmark.prompt))
