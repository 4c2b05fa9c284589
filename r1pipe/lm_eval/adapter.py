"""A checkpoint as a model of lm-evaluation-harness (0.4), with the numbers of its model `hf`.

Likelihoods come from passes over rows, completions from the engine of `r1pipe serve`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from r1pipe.chat.stream import AnswerText
from r1pipe.chat.template import Chat
from r1pipe.core.errors import ConfigError
from r1pipe.model import Policy
from r1pipe.model.likelihood import likelihoods
from r1pipe.runs import checkpoints, heartbeat, stopping
from r1pipe.serve.engine import Engine
from r1pipe.serve.request import Failed, News, Request
from r1pipe.train.rollout import SamplingParams
from r1pipe.train.rollout.batching import PREFILL_TOKENS, PREFILL_TOKENS_GPU
from r1pipe.train.rollout.slots import fitting
from r1pipe.train.standalone import load

NAME = "r1pipe"
MAX_NUM_SEQS = 64  # completions that are drawn together
DEFAULT_TOKENS = 256  # of a completion, as lm_eval's own models have it
SPENT = ("until", "max_gen_toks", "do_sample", "temperature", "top_p")
NEUTRAL = {"num_beams": 1, "top_k": 0, "repetition_penalty": 1, "presence_penalty": 0, "min_p": 0}

Row = tuple[tuple[str, str], list[int], list[int]]  # texts, tokens of the context, of what follows it


def register() -> None:
    """Let lm_eval know the model; again is no error."""
    if NAME not in model_registry:
        model_registry.register(NAME, target=Checkpoint)


class Checkpoint(TemplateLM):
    """`--model r1pipe --model_args checkpoint=DIR`: a bundled model or one of transformers."""

    def __init__(
        self,
        checkpoint: str,
        batch_size: int | str | None = None,  # completions drawn together; rows of a pass are as many as fit
        max_batch_size: int | None = None,
        device: str | None = None,  # None: the GPU if there is one
        seed: int = 0,  # of completions that are not greedy
        system: str | None = None,  # of chats that bring none; None: the checkpoint's own
        max_gen_toks: int = DEFAULT_TOKENS,
        think_end_token: str | None = None,  # completions are scored from behind it on
    ):
        super().__init__()
        folder = Path(checkpoint)
        if (folder / checkpoints.MANIFEST).exists():  # a plain folder of transformers has none
            checkpoints.verify(folder)
        chat, model = Chat.load(folder, system), load(folder, _accelerator(device))
        given = [int(size) for size in map(str, (batch_size, max_batch_size)) if size.isdecimal()]
        self.max_num_seqs = max(1, min(given, default=MAX_NUM_SEQS))  # "auto" and None: MAX_NUM_SEQS
        self._take(chat, model, int(seed), int(max_gen_toks), think_end_token)

    @classmethod
    def of_model(
        cls, chat: Chat, model: Policy, seed: int, max_gen_toks: int, think_end_token: str | None, seqs: int
    ) -> "Checkpoint":
        """A model that is loaded already."""
        made = cls.__new__(cls)
        TemplateLM.__init__(made)
        made.max_num_seqs = seqs
        made._take(chat, model, seed, max_gen_toks, think_end_token)
        return made

    def _take(
        self, chat: Chat, model: Policy, seed: int, max_gen_toks: int, think_end_token: str | None
    ) -> None:
        self.chat, self.model, self.seed, self.max_gen_toks = chat, model, seed, max_gen_toks
        self.think_end_token = think_end_token
        self.max_length = model.config.max_position_embeddings
        self._device = model.lm_head.weight.device

    @property
    def eot_token_id(self) -> int:
        return self.chat.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without context is read after."""
        return self.chat.eos_id if self.chat.bos_id is None else self.chat.bos_id

    @property
    def tokenizer_name(self) -> str:
        return f"{NAME}-{self.chat.tokenizer_hash[:12]}-{self.chat.template_hash[:12]}"

    def get_model_info(self) -> dict[str, Any]:
        """For the results."""
        parameters = sum(weight.numel() for weight in self.model.parameters())
        return {"model_num_parameters": parameters, "model_dtype": str(self.model.lm_head.weight.dtype)}

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.chat.source if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text; without `add_generation_prompt`, up to the end of its last turn."""
        text = self.chat.render(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)] if last else text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """As the tokenizer does it, with its BOS if it writes one and the text does not begin with it."""
        if add_special_tokens is None:
            prefix = self.chat.tokenizer.decode([self.prefix_token_id], skip_special_tokens=False)
            add_special_tokens = not string.startswith(prefix)
        return self.chat.tokenizer.encode(string, add_special_tokens=add_special_tokens).ids

    def _loglikelihood_tokens(
        self, requests: Sequence[Row], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-probability of what follows each context, whether greedy decoding would draw it)."""
        rows = [(context + rest)[-(self.max_length + 1) :] for _, context, rest in requests]
        found: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(rows), disable=disable_tqdm, desc="Running loglikelihood requests") as shown:
            for numbers in self._batches(rows):
                _go_on()
                for number, of_row in zip(
                    numbers, likelihoods(self.model, [rows[number] for number in numbers], 1), strict=True
                ):
                    texts, _, rest = requests[number]
                    logprob = of_row.logprobs_T[-len(rest) :].sum().item() if rest else 0.0
                    greedy = not rest or of_row.top_tokens_Tk[-len(rest) :, 0].tolist() == rest
                    found[number] = logprob, greedy
                    self.cache_hook.add_partial("loglikelihood", texts, found[number])
                shown.update(len(numbers))
        return [found[number] for number in range(len(rows))]

    def _batches(self, rows: Sequence[list[int]]) -> Iterator[list[int]]:
        """Numbers of rows for one pass after the other, the longest first."""
        most = PREFILL_TOKENS if self._device.type == "cpu" else PREFILL_TOKENS_GPU
        left = sorted(range(len(rows)), key=lambda number: -len(rows[number]))
        while left:
            count = fitting([len(rows[number]) for number in left], most)
            yield left[:count]
            left = left[count:]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, in windows of the model's length."""
        windows: list[Row] = []
        ends = []
        for (text,) in (request.args for request in requests):
            parts = utils.get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [((text, ""), *utils.make_disjoint_window(part)) for part in parts]
            ends.append(len(windows))
        found = [logprob for logprob, _ in self._loglikelihood_tokens(windows, disable_tqdm)]
        return [sum(found[first:end]) for first, end in zip([0, *ends], ends, strict=False)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """A completion of each context, up to the first of its stop strings."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        found: dict[int, str] = {}
        engine = Engine(
            self.model, self.chat.eos_ids, self.chat.pad_id, self.max_num_seqs, max_waiting=len(requests)
        )
        engine.start()
        try:
            with tqdm(
                total=len(requests), disable=disable_tqdm, desc="Running generate_until requests"
            ) as shown:
                for numbers in groups.values():
                    contexts = [requests[number].args[0] for number in numbers]
                    given = requests[numbers[0]].args[1]
                    for place, text in self._drawn(engine, contexts, given):
                        found[numbers[place]] = text
                        self.cache_hook.add_partial("generate_until", (contexts[place], given), text)
                        shown.update(1)
        finally:
            engine.close(0)
        return [found[number] for number in range(len(requests))]

    def _drawn(self, engine: Engine, contexts: list[str], given: dict[str, Any]) -> Iterator[tuple[int, str]]:
        """(place, text) of the contexts' completions, as they end."""
        params, until = self._params(given)
        room = self.max_length - params.max_tokens
        prompts = [self.tok_encode(context)[-room:] for context in contexts]
        request = Request(prompts, [params.max_tokens] * len(prompts), params)
        early = [] if self.think_end_token else until  # a thought may have any text in it
        texts, texts_so_far = [AnswerText(self.chat, early, False) for _ in prompts], [""] * len(prompts)
        left, total = set(range(len(prompts))), len(prompts)
        engine.submit(request)
        while left:
            _go_on()
            news = request.news.get()
            if isinstance(news, Failed):
                raise ConfigError(f"{total} completions cannot be drawn: {news.message}")
            if not isinstance(news, News) or news.answer not in left:
                continue
            place = news.answer
            texts_so_far[place] += texts[place].feed(news.tokens, news.finish_reason is not None).content
            if news.finish_reason or texts[place].stopped:
                left.remove(place)
                engine.drop(request, place)
                yield place, postprocess_generated_text(texts_so_far[place], until, self.think_end_token)

    def _params(self, given: dict[str, Any]) -> tuple[SamplingParams, list[str]]:
        """How a task's completions are drawn, and its stop strings. Raises ConfigError for what we lack."""
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        for key in kwargs.keys() - set(SPENT):
            if kwargs[key] is not None and kwargs[key] != NEUTRAL.get(key):
                raise ConfigError(f"gen_kwargs: {key}={kwargs[key]} is not supported; leave it out")
        temperature = float(kwargs.get("temperature") or 0.0) if kwargs["do_sample"] else 0.0
        if kwargs["do_sample"] and "temperature" not in kwargs:
            temperature = 1.0
        most = int(kwargs["max_gen_toks"])
        if not 0 < most < self.max_length:
            raise ConfigError(f"max_gen_toks={most} leaves no room for a prompt in {self.max_length} tokens")
        params = SamplingParams(most, temperature, float(kwargs.get("top_p") or 1.0), seed=self.seed)
        return params, [text for text in kwargs["until"] if text]


def _go_on() -> None:
    """In a job: it is alive. Raises Stopped on a request to stop."""
    heartbeat.tick()
    if stopping.requested():
        raise stopping.Stopped


def _accelerator(device: str | None) -> str:
    """lm_eval's name of a device for choose_device; its default is cuda:0 everywhere. Raises ConfigError."""
    if device == "cpu":
        return device
    if device is None or device.partition(":")[0] == "cuda":
        return "auto"
    raise ConfigError(f"--device {device}: give cpu or cuda")
