"""Answers questions with a checkpoint: what `r1pipe generate` and `r1pipe chat` run. No DeepSpeed here.

    python stages/generate.py OPTIONS_FILE     the JSON of r1pipe.config.script_options.GenerateOptions

Temperature and top-p default to those of the checkpoint's generation_config.json. Each question is
independent, as in training: the model does not see a chat's earlier turns. It runs on the GPU in bfloat16 if
there is one. A system prompt is told on standard error.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace

from r1pipe.chat.template import Chat
from r1pipe.config import script_options
from r1pipe.config.script_options import GenerateOptions
from r1pipe.core import terminal
from r1pipe.core.errors import DataError
from r1pipe.core.types import Prompt
from r1pipe.runs import checkpoints
from r1pipe.train.rollout import SamplingParams, WholeWeights
from r1pipe.train.rollout.bundled import BundledSampler
from r1pipe.train.standalone import drawing_defaults, load

MAX_NUM_SEQS = 64  # answered together


def main(options: GenerateOptions) -> int:
    """Answer every valid question: 0, or 1 if some were invalid, 2 if all were."""
    folder = options.checkpoint
    checkpoints.verify(folder)
    chat, model = Chat.load(folder, options.system), load(folder)
    if chat.system:
        print(f"system prompt: {chat.system}", file=sys.stderr)
    sampler = BundledSampler(chat.eos_ids, chat.pad_id)
    sampler.update(WholeWeights(model), 0)
    context = model.config.max_position_embeddings
    defaults = drawing_defaults(folder)
    params = SamplingParams(
        max_tokens=options.max_tokens or context,
        temperature=defaults.temperature if options.temperature is None else options.temperature,
        top_p=defaults.top_p if options.top_p is None else options.top_p,
        seed=options.seed,
        max_num_seqs=MAX_NUM_SEQS,
    )
    count = invalid = 0
    for number, questions in enumerate(rounds(options)):
        prompts: list[tuple[str, list[int]]] = []
        for question in questions:
            count += 1
            try:
                prompts.append((question, prompt_tokens(question, chat, context)))
            except DataError as error:
                invalid += 1
                terminal.complain(f"question {count} {error}")
        if not prompts:
            continue
        # each answer may be as long as its own question leaves room for
        limits = [min(params.max_tokens, context - len(tokens)) for _, tokens in prompts]
        of_round = replace(params, seed=params.seed + number, max_tokens=max(limits))
        completions = sampler.generate([tokens for _, tokens in prompts], of_round, limits=limits)
        for (question, _), completion in zip(prompts, completions, strict=True):
            text = chat.response(completion.tokens)
            if options.as_json:
                row = {"question": question, "answer": text, "finish_reason": completion.finish_reason}
                print(json.dumps(row, ensure_ascii=False), flush=True)
            else:
                print(text + (" […]" if completion.truncated else ""), end="\n\n", flush=True)
    if options.chat or not invalid:
        return 0
    return 2 if invalid == count else 1


def rounds(options: GenerateOptions) -> Iterator[list[str]]:
    """The questions to answer together: all at once, or one at a time in a chat."""
    if not options.chat:
        yield options.questions or [line.strip() for line in sys.stdin if line.strip()]
        return
    while True:
        print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield [line.strip()]


def prompt_tokens(question: str, chat: Chat, context: int) -> list[int]:
    """The question as the model reads it. Raises DataError if it is not text or fills the context."""
    try:
        question.encode()
    except UnicodeEncodeError:
        raise DataError("is not valid UTF-8; convert it") from None
    tokens = chat.prompt_tokens(Prompt("", "", "", question))
    if len(tokens) >= context:
        raise DataError(f"has {len(tokens)} tokens and leaves no room in the model's {context}; shorten it")
    return tokens


if __name__ == "__main__":
    terminal.run(lambda: main(script_options.read(GenerateOptions, sys.argv)))
