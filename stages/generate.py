"""Answers questions with a checkpoint: what `r1pipe generate` and `r1pipe chat` run. No DeepSpeed here.

    python stages/generate.py CHECKPOINT_FOLDER "Use 3, 5 and 7 to make 22."     one or more questions
    python stages/generate.py CHECKPOINT_FOLDER --json < questions.txt           one question a line
    python stages/generate.py CHECKPOINT_FOLDER --chat                           question by question

Temperature and top-p are those of the checkpoint's generation_config.json unless given. Every question stands
alone, as in training: a chat's earlier turns are not shown to the model.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from r1pipe.chat.template import Chat
from r1pipe.core.arguments import Arguments
from r1pipe.core.errors import ConfigError, R1pipeError
from r1pipe.core.types import Completion, Prompt
from r1pipe.model import load_pretrained
from r1pipe.runs import checkpoints
from r1pipe.train.rollout import Sampler, SamplingParams

SLOTS = 64


def main(arguments: argparse.Namespace) -> None:
    folder = Path(arguments.checkpoint)
    checkpoints.verify(folder)
    chat = Chat.load(folder)
    sampler = Sampler(load_pretrained(folder).eval(), chat.eos_id, chat.pad_id, SLOTS)
    settings = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    for name in ("temperature", "top_p"):
        if getattr(arguments, name) is None:
            setattr(arguments, name, settings.get(name, 1.0))
    for number, questions in enumerate(rounds(arguments)):
        for question, completion in answer(sampler, chat, questions, arguments, number):
            show(question, completion, arguments.json)


def rounds(arguments: argparse.Namespace) -> Iterator[list[str]]:
    """The questions to answer together: all at once, or one after the other in a chat."""
    if not arguments.chat:
        yield arguments.questions or [line.strip() for line in sys.stdin if line.strip()]
        return
    while True:
        print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield [line.strip()]


def answer(
    sampler: Sampler, chat: Chat, questions: Sequence[str], arguments: argparse.Namespace, number: int
) -> Iterator[tuple[str, Completion]]:
    """Each question with its completion. Raises ConfigError where a question leaves no room for an answer."""
    prompts = [chat.prompt_tokens(Prompt("", "", "", question)) for question in questions]
    room = sampler.model.config.max_position_embeddings - max(map(len, prompts), default=0)
    if room < 1:
        raise ConfigError("a question is longer than the model's context; ask it in fewer words")
    params = SamplingParams(
        max_tokens=min(room, arguments.max_tokens or room),
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        seed=arguments.seed + number,
    )
    for question, completion in zip(questions, sampler.generate(prompts, params), strict=True):
        completion.text = chat.decode(completion.tokens)
        yield question, completion


def show(question: str, completion: Completion, as_json: bool) -> None:
    if as_json:
        row = {"question": question, "answer": completion.text, "finish_reason": completion.finish_reason}
        print(json.dumps(row, ensure_ascii=False), flush=True)
    else:
        print(completion.text + (" […]" if completion.truncated else ""), end="\n\n", flush=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Arguments(description="Answer questions with a checkpoint.")
    parser.add_argument("checkpoint", help="checkpoint folder")
    parser.add_argument("questions", nargs="*", help="none: lines of standard input")
    parser.add_argument("--chat", action="store_true", help="ask and answer until the input ends")
    parser.add_argument("--json", action="store_true", help="one JSON object per answer")
    parser.add_argument("--temperature", type=float, help="0 is greedy")
    parser.add_argument("--top-p", type=float, help="share of probability that is sampled from")
    parser.add_argument("--max-tokens", type=int, help="longest answer; none: what the context leaves")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers")
    return parser.parse_intermixed_args(arguments)


if __name__ == "__main__":
    try:
        main(parse(sys.argv[1:]))
    except R1pipeError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
