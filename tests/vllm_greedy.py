"""Run by test_vllm.py in vLLM's own environment: greedy tokens of an exported folder and their logprobs.

python vllm_greedy.py FOLDER PROMPTS.json ANSWERS.json        lists of token ids in, an object each out
"""

import json
import os
import sys
from pathlib import Path

os.environ["VLLM_MLA_DISABLE"] = "1"  # its MLA kernels take the latent of V3's own size alone
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GB
os.environ["HF_HUB_OFFLINE"] = "1"

from vllm import LLM, SamplingParams

MAX_TOKENS = 24
# vLLM 0.32's CPU kernel turns the queries of several heads by wrong angles when they come as [tokens, heads,
# width], as in its DeepSeek models; its plain PyTorch version is right.
WITHOUT_ROTARY_KERNEL = {"custom_ops": ["all", "-rotary_embedding"]}


def main(folder: str, prompts: Path, answers: Path) -> None:
    asked = [{"prompt_token_ids": tokens} for tokens in json.loads(prompts.read_text())]
    size = {"max_model_len": 256, "max_num_seqs": 8}
    llm = LLM(folder, dtype="float32", enforce_eager=True, compilation_config=WITHOUT_ROTARY_KERNEL, **size)
    params = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, logprobs=0)
    rows = []
    for result in llm.generate(asked, params, use_tqdm=False):
        drawn = result.outputs[0]
        logprobs = [
            place[token].logprob for place, token in zip(drawn.logprobs, drawn.token_ids, strict=True)
        ]
        rows.append({"tokens": list(drawn.token_ids), "logprobs": logprobs, "reason": drawn.finish_reason})
    answers.write_text(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
