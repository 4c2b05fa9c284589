"""TRL's GRPOTrainer on the same weights: same prompts, reward, KL and optimizer; it samples by generate()."""

import tempfile
from typing import Any

from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from bench.config import Job
from bench.transformers_peer import load_options
from bench.turns import Turns, rows

MOST_TURNS = 1000


class _OnTurns(TrainerCallback):
    """Lets the trainer take a step per turn; its first step warms up."""

    def __init__(self, turns: Turns):
        self.turns, self.warm = turns, False

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


def _tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Words "0", "1" ... are the tokens of that number."""
    words = Tokenizer(WordLevel({str(n): n for n in range(vocab_size)}, unk_token="0"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="0", eos_token="1", unk_token="0", padding_side="left"
    )


def _even(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(token % 2 == 0 for token in tokens) / len(tokens) for tokens in completion_ids]


def work(job: Job, turns: Turns) -> None:
    """A GRPO step per turn: one batch of all samples, one optimizer step, a reference model for the KL."""
    case = job.case
    texts = [
        " ".join(map(str, row))
        for row in rows(case.sequences // case.group, case.prompt, job.model.vocab_size)
    ]
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=case.sequences,
            num_generations=case.group,
            max_completion_length=case.new,
            generation_kwargs={"min_new_tokens": case.new},
            temperature=1.0,
            beta=0.04,
            learning_rate=1e-4,
            max_steps=MOST_TURNS,
            lr_scheduler_type="constant",
            bf16=job.setting.dtype == "bf16",
            gradient_checkpointing=False,
            use_cpu=job.device == "cpu",
            logging_strategy="no",
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
            processing_class=_tokenizer(job.model.vocab_size),
            callbacks=[_OnTurns(turns)],
        )
        try:
            trainer.train()
        except EOFError:
            return
