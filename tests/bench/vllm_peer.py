"""vLLM on the same weights, in its own environment: `VLLM_PYTHON -m bench.vllm_peer JOB.json`.

Imports vLLM and the standard library alone.
"""

import json
import os
import sys
from pathlib import Path

from bench.turns import DTYPES, Turns, rows

# vLLM 0.32's CPU kernel turns the queries of DeepSeek models by wrong angles; plain PyTorch is right.
WITHOUT_ROTARY_KERNEL = {"custom_ops": ["all", "-rotary_embedding"]}


def main(path: str) -> None:
    """Sample per turn; the engine in this process, so that its memory is this process's."""
    turns = Turns()
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    case, setting = job["case"], job["setting"]
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_MLA_DISABLE": "1",  # its MLA kernels take the latent of V3's own size alone
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
    }
    from vllm import LLM, SamplingParams

    llm = LLM(
        job["weights"],
        dtype=DTYPES[setting["dtype"]],
        enforce_eager=setting["options"]["eager"] == "true",
        max_model_len=case["prompt"] + case["new"],
        max_num_seqs=case["sequences"],
        enable_prefix_caching=False,  # every turn has the same prompts
        skip_tokenizer_init=True,
        compilation_config=WITHOUT_ROTARY_KERNEL,
    )
    prompts = rows(case["sequences"], case["prompt"], job["vocab_size"])
    asked = [{"prompt_token_ids": tokens} for tokens in prompts]
    params = SamplingParams(max_tokens=case["new"], temperature=1.0, ignore_eos=True, detokenize=False)
    turns.run(lambda: llm.generate(asked, params, use_tqdm=False))
    turns.finish()


if __name__ == "__main__":
    main(sys.argv[1])
