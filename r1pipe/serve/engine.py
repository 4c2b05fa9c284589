"""Draws the answers of all requests together: new ones join the batch while others are drawn.

One thread has the model. It takes waiting answers into free slots, draws a few tokens in every slot, and
tells each request what is new. An answer's random numbers depend on its request's seed and its place in the
request alone: it does not matter who shares the batch, as far as the kernels sum each row by itself.

Axes: S slots, V vocabulary, k alternatives.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from r1pipe.core.errors import R1pipeError
from r1pipe.model import Policy
from r1pipe.model.likelihood import likelihoods
from r1pipe.model.policy import decoder_of
from r1pipe.serve.request import Alternatives, Busy, Closing, News, PromptRead, Request
from r1pipe.train.rollout.batching import CACHE_TOKENS, PREFILL_TOKENS, PREFILL_TOKENS_GPU
from r1pipe.train.rollout.checks import check_drawn
from r1pipe.train.rollout.drawing import SamplingParams, draw, uniform_stream
from r1pipe.train.rollout.slots import Slots, Start, fitting

POLL_S = 0.1


@dataclass(eq=False)
class _Answer:
    """One answer that waits or is drawn."""

    request: Request
    prompt: int
    sample: int
    told: int = 0  # tokens that the request has been told
    alternatives: list[Alternatives] = field(default_factory=list)  # from the first token on

    @property
    def number(self) -> int:
        return self.prompt * self.request.params.n + self.sample

    @property
    def dropped(self) -> bool:
        return self.request.over or self.number in self.request.dropped


class Engine:
    """Draws answers in a thread of its own, from `start` to `close`."""

    def __init__(
        self, model: Policy, eos_ids: tuple[int, ...], pad_id: int, max_num_seqs: int, max_waiting: int
    ):
        self.model, self.eos_ids, self.pad_id = model, eos_ids, pad_id
        self.max_num_seqs, self.max_waiting = max_num_seqs, max_waiting
        self.longest = model.config.max_position_embeddings
        self.running: dict[int, _Answer] = {}  # by their slot's number
        self.waiting: deque[_Answer] = deque()
        self._starting: list[_Answer] = []  # taken from those that wait, not running yet
        self._changed = threading.Condition()
        self._closing = self._ended = False
        self._next = 0  # number of the next slot
        self._slots: Slots | None = None  # made when something comes, let go when nothing is left
        self._decoder = decoder_of(model)
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._ended

    def submit(self, request: Request) -> None:
        """Have a request's answers drawn; what is found goes to `request.news`. Raises Busy and Closing."""
        n = request.params.n
        answers = [_Answer(request, i, j) for i in range(len(request.prompts)) for j in range(n)]
        with self._changed:
            if self._closing or self._ended:
                raise Closing
            if len(self.waiting) + len(answers) > self.max_waiting:
                raise Busy
            self.waiting += answers
            self._changed.notify()

    def drop(self, request: Request, answer: int | None = None) -> None:
        """No longer draw an answer of a request; None: any."""
        request.dropped |= {answer} if answer is not None else frozenset(range(request.answers))
        request.over = len(request.dropped) == request.answers
        if request.over:
            with self._changed:
                self.waiting = deque(one for one in self.waiting if one.request is not request)

    def close(self, grace_s: float, at_once: threading.Event | None = None) -> None:
        """Take nothing new, draw to the end for so many seconds or until `at_once`, and tell those that are
        left."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        ends = time.monotonic() + grace_s
        while self.alive and time.monotonic() < ends and not (at_once and at_once.is_set()):
            self._thread.join(POLL_S)
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join()

    @torch.inference_mode()
    def _work(self) -> None:
        try:
            while self._wait():
                self._refill()
                if self._slots is not None:
                    self._slots.step()
                    self._tell()
        finally:  # an error that nobody expects ends the thread, but leaves no request without an answer
            with self._changed:
                self._ended = True
                left = {one.request for one in (*self.waiting, *self._starting, *self.running.values())}
                self.waiting.clear()
            for request in left:
                request.fail("the server has ended; ask again later", 503)

    def _wait(self) -> bool:
        """Wait for something to do; false: nothing more will come."""
        with self._changed:
            while not (self.waiting or self.running or self._closing or self._ended):
                self._changed.wait()
            return not self._ended and bool(self.waiting or self.running)

    def _refill(self) -> None:
        """Read the prompts of waiting answers, as many as one pass should hold, and start them."""
        taken = self._starting = self._taken()
        if not taken:
            return
        for answer in taken:
            self._read_prompt(answer.request, answer.prompt)
        drawn = [answer for answer in taken if answer.request.limits[answer.prompt]]
        keys = list(dict.fromkeys((answer.request, answer.prompt) for answer in drawn))
        prompts = [request.prompts[prompt] for request, prompt in keys]
        if not drawn:
            return
        slots = self._room_for(len(drawn), max(map(len, prompts)) + CACHE_TOKENS)
        starts = []
        for answer in drawn:
            self.running[self._next] = answer
            row, params = keys.index((answer.request, answer.prompt)), answer.request.params
            stream = uniform_stream(params.seed, answer.prompt, answer.sample, params.max_tokens)
            limit = answer.request.limits[answer.prompt]
            starts.append(Start(self._next, row, len(prompts[row]), limit, stream))
            self._next += 1
        slots.start(slots.free()[: len(starts)], starts, slots.prefill(prompts, self.pad_id))

    def _taken(self) -> list[_Answer]:
        """The next waiting answers that slots and a pass have room for; those that nobody wants go."""
        taken: list[_Answer] = []
        lengths: dict[tuple[Request, int], int] = {}
        on_cpu = self.model.lm_head.weight.device.type == "cpu"
        most = PREFILL_TOKENS if on_cpu else PREFILL_TOKENS_GPU
        with self._changed:
            while self.waiting and len(self.running) + len(taken) < self.max_num_seqs:
                answer = self.waiting[0]
                if not answer.dropped:
                    lengths[answer.request, answer.prompt] = len(answer.request.prompts[answer.prompt])
                    if fitting([*lengths.values()], most) < len(lengths):
                        break
                    taken.append(answer)
                self.waiting.popleft()
        return taken

    def _read_prompt(self, request: Request, prompt: int) -> None:
        """Tell the log-probabilities of a prompt if its request wants them and has not been told; read alone,
        so that they do not depend on other requests."""
        if request.read_prompts and prompt not in request.prompts_told:
            request.prompts_told.add(prompt)
            [found] = likelihoods(self.model, [request.prompts[prompt]], request.top or 0)
            request.news.put(PromptRead(prompt, found))

    def _room_for(self, answers: int, length: int) -> Slots:
        """The slots, with so many free, and room for prompts and first tokens of such a length."""
        wanted = len(self.running) + answers
        if self._slots is None:
            size = wanted, min(length, self.longest), self.longest, self.longest
            self._slots = Slots(self._decoder, self._draw, self.eos_ids, *size)
        slots = self._slots
        if wanted > len(slots.numbers):
            slots.widen(min(self.max_num_seqs, max(wanted, 2 * len(slots.numbers))))
        slots.grow(length)
        return slots

    def _draw(self, slots: np.ndarray, logits_SV: Tensor, uniform_S: Tensor) -> tuple[Tensor, Tensor]:
        """As drawing.draw, each slot by its own request; log-probabilities are under softmax(logits)."""
        assert self._slots is not None
        answers = [self.running.get(number) for number in self._slots.numbers[slots].tolist()]
        tokens_S = torch.zeros(len(slots), dtype=torch.long, device=logits_SV.device)
        logprobs_S = torch.zeros(len(slots), device=logits_SV.device)
        groups: dict[tuple[float, float], list[int]] = {}
        for row, answer in enumerate(answers):
            if answer is not None:
                params = answer.request.params
                groups.setdefault((params.temperature, params.top_p), []).append(row)
        for (temperature, top_p), rows in groups.items():
            params = SamplingParams(1, temperature, top_p)
            chosen = torch.tensor(rows, device=logits_SV.device)
            tokens_S[chosen], logprobs_S[chosen] = draw(logits_SV[chosen], uniform_S[chosen], params)
        wanting = [row for row, answer in enumerate(answers) if answer and answer.request.top is not None]
        if wanting:
            chosen = torch.tensor(wanting, device=logits_SV.device)
            logprobs_SV = logits_SV[chosen].float().log_softmax(dim=-1)
            logprobs_S[chosen] = logprobs_SV.gather(1, tokens_S[chosen].unsqueeze(1)).squeeze(1)
            self._note([answers[row] for row in wanting], logprobs_SV)
        return tokens_S, logprobs_S

    def _note(self, answers: Sequence[_Answer | None], logprobs_SV: Tensor) -> None:
        """Keep the likeliest tokens; an answer that has ended gets more of them than it has tokens."""
        most = max(answer.request.top or 0 for answer in answers if answer)
        top = logprobs_SV.topk(min(most, logprobs_SV.shape[1]), dim=-1)
        for answer, tokens, logprobs in zip(answers, top.indices.tolist(), top.values.tolist(), strict=True):
            assert answer is not None and answer.request.top is not None
            answer.alternatives.append((tokens[: answer.request.top], logprobs[: answer.request.top]))

    def _tell(self) -> None:
        """Tell each request what its answers have got, and free the slots of those that have ended."""
        slots = self._slots
        assert slots is not None
        taken, ended, over = slots.taken(), set(slots.ended().tolist()), []
        answers = [self.running[number] for number in slots.numbers[taken].tolist()]
        found = slots.drawn(taken, [answer.told for answer in answers])
        for slot, answer, drawn in zip(taken.tolist(), answers, found, strict=True):
            reason = None
            if slot in ended:
                reason = "stop" if drawn.tokens[-1] in slots.stops else "length"
            if not answer.dropped:
                self._tell_one(answer, drawn.tokens, drawn.logprobs, reason)
            if reason or answer.dropped:
                del self.running[int(slots.numbers[slot])]
                over.append(slot)
        if over:
            slots.release(np.array(over))
            self._shrink(slots)

    def _tell_one(
        self, answer: _Answer, tokens: list[int], logprobs: list[float], reason: str | None
    ) -> None:
        request, told = answer.request, answer.told
        try:
            check_drawn(self.model, request.prompts[answer.prompt], tokens, logprobs)
        except R1pipeError as error:  # the weights are damaged
            request.fail(str(error), 500)
            return
        answer.told += len(tokens)
        alternatives = answer.alternatives[told : answer.told]
        told_logprobs = [] if request.top is None else logprobs
        request.news.put(News(answer.number, tokens, told_logprobs, alternatives, reason))

    def _shrink(self, slots: Slots) -> None:
        """Keep twice as many slots as are taken at most: free ones are computed, too."""
        if not self.running:
            self._slots = None
        elif 2 * len(self.running) < len(slots.numbers):
            slots.shrink(len(self.running))

    def state(self) -> tuple[int, int]:
        """How many answers are drawn, and how many wait."""
        return len(self.running), len(self.waiting)
