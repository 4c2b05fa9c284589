"""Run by test_vllm.py in vLLM's own environment: greedy tokens and their logprobs of an exported folder.

python vllm_greedy.py FOLDER < prompts.json > answers.json        lists of token ids in; one object each out
"""

import json
import os
import sys

os.environ.setdefault("VLLM_MLA_DISABLE", "1")  # its MLA kernels take kv_lora 512 with rope 64 alone
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from vllm import LLM, SamplingParams

MAX_TOKENS = 24


def main(folder: str) -> None:
    asked = [{"prompt_token_ids": tokens} for tokens in json.load(sys.stdin)]
    answers, sys.stdout = sys.stdout, sys.stderr  # vLLM prints its own lines
    llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=8)
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, logprobs=0)
    for result in llm.generate(asked, params, use_tqdm=False):
        drawn = result.outputs[0]
        logprobs = [
            place[token].logprob for place, token in zip(drawn.logprobs, drawn.token_ids, strict=True)
        ]
        row = {"tokens": list(drawn.token_ids), "logprobs": logprobs, "finish_reason": drawn.finish_reason}
        print(json.dumps(row), file=answers)


if __name__ == "__main__":
    main(sys.argv[1])
