"""Asking a judge: which of two answers is better, how good one is, and whether it says what a reference says.

R1's supplement: four verdicts on each pair, the answers swapped to mitigate position bias, and their mean.
"""

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from r1pipe.chat.answerer import Answerer, AnswerParams, Identity, Progress
from r1pipe.config.judge import JudgeConfig, JudgePrompt, prompts_of
from r1pipe.core.estimates import mean
from r1pipe.core.types import Prompt
from r1pipe.rewards.judge.cache import AnswerCache, key_of, stream_of
from r1pipe.rewards.judge.prompts import filled, judged_part, question_of, read_verdict
from r1pipe.runs import heartbeat

TOGETHER = 4  # times max_num_seqs prompts are asked before the answers are kept

log = logging.getLogger("r1pipe")
Verdicts = tuple[float | None, ...]  # None: could not be read


def mean_read(votes: Verdicts) -> float | None:
    """The mean of the verdicts that could be read; None without any."""
    return mean(vote for vote in votes if vote is not None)


@dataclass(frozen=True)
class Preference:
    """The verdicts on a pair; above 0 they prefer the first answer, whichever place it stood in."""

    as_a: Verdicts  # with the first answer as A
    as_b: Verdicts  # with the first answer as B

    @property
    def margin(self) -> float | None:
        """The mean of both orders' means; None where an order has no verdict: the other alone is biased."""
        orders = [mean_read(votes) for votes in (self.as_a, self.as_b) if votes]
        known = [value for value in orders if value is not None]
        return sum(known) / len(known) if known and len(known) == len(orders) else None

    @property
    def votes(self) -> Verdicts:
        return self.as_a + self.as_b


@dataclass(frozen=True)
class Rating:
    """The verdicts on one answer."""

    votes: Verdicts

    @property
    def value(self) -> float | None:
        """Their mean; None where none could be read."""
        return mean_read(self.votes)


class Judge:
    """A judge with its prompts and its cache."""

    def __init__(self, answerer: Answerer, config: JudgeConfig, cache: AnswerCache, seed: int = 0):
        """Raises ConfigError for prompts that cannot be read."""
        self.answerer, self.config, self.cache, self.seed = answerer, config, cache, seed
        self.prompts = prompts_of(config.prompts)
        self.weaknesses: list[str] = []  # that it is used in spite of
        self.counts: Counter[str] = Counter()  # verdicts: read, unread; prompts: asked, cached

    @property
    def identity(self) -> Identity:
        return self.answerer.identity

    def compare(
        self,
        pairs: Sequence[tuple[Prompt, str, str]],
        progress: Progress | None = None,
        again: int = 0,
    ) -> list[Preference]:
        """Which of two responses to a prompt is better. `again` above 0 draws the verdicts anew.

        Each order gets half of stage.judge.votes; the odd one goes to either by turns. Raises what the
        answerer raises.
        """
        prompt, half, odd = self.prompts.pairwise, *divmod(self.config.votes, 2)
        asked: list[tuple[Prompt, int]] = []
        for number, (question, first, second) in enumerate(pairs):
            texts = [judged_part(prompt, text) for text in (first, second)]
            for swapped in (False, True):
                a, b = texts[::-1] if swapped else texts
                places = {"question": question_of(question), "answer_a": a, "answer_b": b}
                votes = half + (odd and (number % 2 == 1) == swapped)
                asked.append((self._filled("pairwise", prompt, places), votes))
        verdicts = self._verdicts(prompt, asked, progress, again)
        return [
            Preference(as_a, tuple(None if vote is None else -vote for vote in as_b))
            for as_a, as_b in zip(verdicts[0::2], verdicts[1::2], strict=True)
        ]

    def rate(
        self,
        answers: Sequence[tuple[Prompt, str]],
        kind: str = "pointwise",
        progress: Progress | None = None,
        again: int = 0,
    ) -> list[Rating]:
        """How good a response to a prompt is: `pointwise` (helpful) or `harmless`, on the prompt's scale; or
        `reference`: whether it says what the prompt's answer says."""
        prompt: JudgePrompt = getattr(self.prompts, kind)
        asked = []
        for question, text in answers:
            places = {"question": question_of(question), "answer": judged_part(prompt, text)}
            if kind == "reference":
                places["reference"] = question.answer
            asked.append((self._filled(kind, prompt, places), self.config.votes))
        return [Rating(votes) for votes in self._verdicts(prompt, asked, progress, again)]

    def _filled(self, kind: str, prompt: JudgePrompt, places: dict[str, str]) -> Prompt:
        return filled(prompt, self.prompts.nonce, places, kind)

    def _verdicts(
        self,
        prompt: JudgePrompt,
        asked: Sequence[tuple[Prompt, int]],
        progress: Progress | None,
        again: int,
    ) -> list[Verdicts]:
        """The verdicts on each prompt, of which so many are wanted."""
        found: list[Verdicts] = [()] * len(asked)
        done = 0
        for count in sorted({count for _, count in asked if count}):
            places = [i for i, (_, wanted) in enumerate(asked) if wanted == count]
            before = done

            def show(now: int, _: int, before: int = before) -> None:
                if progress:
                    progress(before + now, len(asked))

            texts = self._texts([asked[i][0] for i in places], count, show, again)
            for i, answers in zip(places, texts, strict=True):
                found[i] = tuple(read_verdict(text, prompt.verdicts) for text in answers)
            done += len(places)
        read = Counter(vote is not None for votes in found for vote in votes)
        self.counts.update(read=read[True], unread=read[False])
        return found

    def _texts(
        self, prompts: Sequence[Prompt], n: int, progress: Callable[[int, int], None], again: int
    ) -> list[list[str]]:
        config = self.config
        params = AnswerParams(
            *(config.max_tokens, config.temperature, config.top_p, n, self.seed + again, config.max_num_seqs)
        )
        return self.texts(prompts, params, progress)

    def texts(
        self, prompts: Sequence[Prompt], params: AnswerParams, progress: Progress | None = None
    ) -> list[list[str]]:
        """What it answers to any prompts; equal ones are asked once, and none that the cache has. Raises what
        the answerer raises, and keeps what was answered before."""
        keys = [key_of(self.identity, prompt, params) for prompt in prompts]
        by_key = dict(zip(keys, prompts, strict=True))
        missing = {key: prompt for key, prompt in by_key.items() if self.cache.get(key) is None}
        self.counts.update(asked=len(missing), cached=len(prompts) - len(missing))
        done = len(prompts) - len(missing)
        for batch in _batches([*missing.items()], TOGETHER * params.max_num_seqs):
            heartbeat.tick()
            before = replace(self.answerer.spent)
            part = [prompt for _, prompt in batch]
            answers = self.answerer.answer(part, replace(params, seed=stream_of(part[0], params.seed)))
            texts = [[completion.text for completion in completions] for completions in answers]
            self.cache.put(
                [(key, text) for (key, _), text in zip(batch, texts, strict=True)],
                self.answerer.spent - before,
            )
            done += len(batch)
            if progress:
                progress(done, len(prompts))
        return [self.cache.get(key) or [] for key in keys]

    def summary(self) -> dict[str, object]:
        """For the record: who judged, how much was asked, and what it has cost in all sessions."""
        spent = self.cache.spent
        return {
            "kind": self.identity.kind,
            "name": self.identity.name,
            "version": self.identity.version,
            "licence": self.identity.licence,
            "prompts": self.config.prompts,
            "weaknesses": self.weaknesses,
            "verdicts_read": self.counts["read"],
            "verdicts_unread": self.counts["unread"],
            "prompts_asked": self.counts["asked"],
            "prompts_cached": self.counts["cached"],
            "requests": spent.requests,
            "prompt_tokens": spent.prompt_tokens,
            "completion_tokens": spent.completion_tokens,
            "seconds": round(spent.seconds, 3),
            "usd": round(spent.usd, 6),
        }


def _batches(items: list[tuple[str, Prompt]], size: int) -> list[list[tuple[str, Prompt]]]:
    return [items[first : first + size] for first in range(0, len(items), size)]
