"""Accuracy in the background: what ends early is judged while the sampler still draws the others.

A check that takes long waits for a process (symbolic.py, monty.py, jail.py), so threads do; none of them
touches torch.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from r1pipe.chat.template import Chat
from r1pipe.core.types import Completion, Prompt, Score
from r1pipe.rewards.accuracy import accuracy, is_verifiable, summary_of
from r1pipe.rewards.symbolic import WORKERS


class Verdicts:
    """The accuracy of completions; equal summaries of one prompt are checked once.

    Leaving its `with` block drops the checks that have not begun: after an error nobody waits for them.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(WORKERS)
        self._found: dict[tuple[str, str], Future[Score]] = {}

    def __enter__(self) -> "Verdicts":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def submit(self, prompt: Prompt, completion: Completion) -> Future[Score] | None:
        """Have a completion checked, unless its like is already; None where no rule applies."""
        if not is_verifiable(prompt):
            return None
        key = (prompt.id, summary_of(completion.text))
        if key not in self._found:
            self._found[key] = self._threads.submit(accuracy, prompt, completion)
        return self._found[key]

    def on_completion(self, chat: Chat, prompts: Sequence[Prompt]) -> Callable[[int, Completion], None]:
        """For a sampler of these prompts to call: decodes each completion that has ended, and begins."""

        def tell(place: int, completion: Completion) -> None:
            completion.text = chat.decode(completion.tokens)
            self.submit(prompts[place], completion)

        return tell

    def results(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Score | None]:
        """The verdict on completion i as an answer to prompt i, waited for; None where no rule applies.

        Raises what a check raised.
        """
        pairs = zip(prompts, completions, strict=True)
        begun = [self.submit(prompt, completion) for prompt, completion in pairs]
        return [None if future is None else future.result() for future in begun]
