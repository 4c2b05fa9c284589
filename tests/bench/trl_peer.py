"""TRL's GRPOTrainer on the same weights: same prompts, reward, KL and optimizer; it samples by generate()."""

import tempfile
from contextlib import suppress
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from bench.config import Job
from bench.transformers_peer import load_options
from bench.turns import Turns, completions, rows

MOST_TURNS = 1000


class _OnTurns(TrainerCallback):
    """Lets the trainer take a step per turn; its first step warms up."""

    def __init__(self, turns: Turns):
        self.turns, self.warm = turns, False
        self.facts: dict[str, float] = {}  # of the first step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self.warm and not self.turns.begin():
            raise EOFError  # no turn is left
        return control

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        if self.warm:
            self.turns.end()
        else:
            self.turns.warm()
        self.warm = True
        return control

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> Any:
        self.facts.setdefault("gradient norm", float(logs.get("grad_norm", 0.0)))
        return control


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Words "0", "1" ... are the tokens of that number."""
    words = Tokenizer(WordLevel({str(n): n for n in range(vocab_size)}, unk_token="0"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="0", eos_token="1", unk_token="0", padding_side="left"
    )


def _even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(token % 2 == 0 for token in tokens) / len(tokens) for tokens in completion_ids]


def _given(job: Job, prompts: list[list[int]], texts: list[str]) -> Any:
    """The completions of an update, in place of sampling."""
    groups: dict[str, list[list[int]]] = {}
    answers = completions(job.case.sequences, job.case.new, job.vocab_size)
    for place, text in enumerate(texts):
        groups[text] = answers[place * job.case.group : (place + 1) * job.case.group]

    def roll_out(asked: list[str], trainer: Any) -> dict[str, Any]:
        left = {text: iter(group) for text, group in groups.items()}
        tokens = dict(zip(texts, prompts, strict=True))
        return {
            "prompt_ids": [tokens[text] for text in asked],
            "completion_ids": [next(left[text]) for text in asked],
            "logprobs": None,
        }

    return roll_out


def work(job: Job, turns: Turns) -> dict[str, float]:
    """A GRPO step per turn: one batch of all samples, one optimizer step, a reference model for the KL. In an
    update the completions are given. Reports the first step's gradient norm."""
    case = job.case
    prompts = rows(case.sequences // case.group, case.prompt, job.vocab_size)
    texts = [" ".join(map(str, row)) for row in prompts]
    given, on_turns = case.kind == "update", _OnTurns(turns)
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=case.sequences,
            num_generations=case.group,
            max_completion_length=case.new,
            generation_kwargs={"min_new_tokens": case.new},
            temperature=1.0,
            beta=0.04,
            loss_type="grpo",
            scale_rewards="none" if given else "group",
            learning_rate=1e-4,
            max_steps=MOST_TURNS,
            lr_scheduler_type="constant",
            bf16=job.setting.dtype == "bf16",
            gradient_checkpointing=False,
            use_cpu=job.device == "cpu",
            logging_strategy="steps",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            model_init_kwargs={"dtype": "float32", **load_options(job)},
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=job.weights,  # a path: the trainer loads its reference model in the same way
            reward_funcs=_even,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": text} for text in texts]),
            processing_class=_tokenizer(job.vocab_size),
            callbacks=[on_turns],
            rollout_func=_given(job, prompts, texts) if given else None,
        )
        with suppress(EOFError):
            trainer.train()
    return on_turns.facts
