"""Accuracy in the background: finished completions are checked while the sampler still draws the others.

A slow check waits for a process (symbolic.py, monty.py, jail.py), so threads suffice; none touches torch.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from r1pipe.chat.template import Chat
from r1pipe.core.types import Completion, Prompt, Score
from r1pipe.rewards.accuracy import accuracy, is_verifiable, summary_of
from r1pipe.rewards.symbolic import WORKERS


class Verdicts:
    """The accuracy of completions; equal summaries of one prompt are checked once.

    Leaving its `with` block cancels the checks that have not begun.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(WORKERS)
        self._futures: dict[tuple[str, str], Future[Score]] = {}

    def __enter__(self) -> "Verdicts":
        return self

    def __exit__(self, *error: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def submit(self, prompt: Prompt, completion: Completion) -> Future[Score] | None:
        """Starts the check of a completion, unless an equal one is running; None where no rule applies."""
        if not is_verifiable(prompt):
            return None
        key = (prompt.id, summary_of(completion.text))
        if key not in self._futures:
            self._futures[key] = self._threads.submit(accuracy, prompt, completion)
        return self._futures[key]

    def on_completion(self, chat: Chat, prompts: Sequence[Prompt]) -> Callable[[int, Completion], None]:
        """The sampler's callback (prompt index, completion): decodes a completion, then checks it."""

        def check(index: int, completion: Completion) -> None:
            completion.text = chat.decode(completion.tokens)
            self.submit(prompts[index], completion)

        return check

    def results(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Score | None]:
        """The accuracy of completion i for prompt i, once checked; None where no rule applies.

        Raises what a check raised.
        """
        futures = [self.submit(p, c) for p, c in zip(prompts, completions, strict=True)]
        return [None if future is None else future.result() for future in futures]
