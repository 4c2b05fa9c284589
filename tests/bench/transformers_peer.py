"""transformers' DeepseekV3ForCausalLM on the same weights: generate(), and a plain AdamW loop."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from bench.config import Job
from bench.turns import DTYPES, EOS, PAD, Turns, rows

NAMES = {"attention": "attn", "experts": "experts"}


def load_options(job: Job) -> dict[str, str]:
    """The job's implementations, as from_pretrained calls them."""
    return {f"{NAMES[name]}_implementation": value for name, value in job.setting.options.items()}


def load(job: Job, dtype: torch.dtype) -> Any:
    """The model on the job's device."""
    return AutoModelForCausalLM.from_pretrained(job.weights, dtype=dtype, **load_options(job)).to(job.device)


def work(job: Job, turns: Turns) -> None:
    """Answer turns with the case of the job."""
    {"sample": _sample, "train": _train}[job.case.kind](job, turns)


@torch.inference_mode()
def _sample(job: Job, turns: Turns) -> None:
    model = load(job, getattr(torch, DTYPES[job.setting.dtype])).eval()
    tokens_BT = torch.tensor(rows(job.case.sequences, job.case.prompt, job.vocab_size)).to(job.device)
    turns.run(
        lambda: model.generate(
            tokens_BT,
            attention_mask=torch.ones_like(tokens_BT),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            min_new_tokens=job.case.new,
            max_new_tokens=job.case.new,
            eos_token_id=EOS,
            pad_token_id=PAD,
        )
    )


def _train(job: Job, turns: Turns) -> None:
    """Float32 weights and AdamW in every setting; bf16 computes under autocast."""
    model = load(job, torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    tokens_BT = torch.tensor(rows(job.case.sequences, job.case.prompt, job.vocab_size)).to(job.device)
    bf16 = job.setting.dtype == "bf16"

    def step() -> None:
        with torch.autocast(job.device, torch.bfloat16, enabled=bf16):
            loss = model(input_ids=tokens_BT, labels=tokens_BT, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    turns.run(step)
