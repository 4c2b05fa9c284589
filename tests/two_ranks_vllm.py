"""Run on two ranks, from test_vllm_faults.py: a fake vLLM server, and weights under ZeRO-3.

Rank 0 holds the server. The faults hit the prompts of one rank; both ranks must go the same way.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from fake_vllm import FakeVLLM
from fake_vllm_samplers import PARAMS, PROMPTS, WORDS, in_process, opened_at, restart
from jobs import OPTIM, ROUTER, engine_config, tiny_model

from r1pipe.core.errors import SamplerLost
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.patches import exit_immediately_with
from r1pipe.train.rollout.vllm import serving

if __name__ == "__main__":
    torch.set_num_threads(1)
    serving.AGAIN_S = 0.02
    engine = Engine(tiny_model(), OPTIM, ROUTER, engine_config(2, 3), total_steps=10)
    server = FakeVLLM(tiny_model(), WORDS) if engine.rank == 0 else None
    url = engine.all_gather_objects(server.url if server else "")[0]
    if server:
        restart(server)  # its own weights are not the trainer's
    sampler = opened_at(url, ranks=engine, wait_s=60.0)
    sampler.update(engine, 5)
    if server:
        server.after = {9: lambda: restart(server)}  # of twelve
    mine = [PROMPTS, PROMPTS[::-1]][engine.rank]
    found = sampler.generate(mine, PARAMS)
    with engine.gathered() as model:
        expected = in_process(model)
    if engine.rank == 1:
        expected = [tokens for i in (4, 2, 0) for tokens in expected[i : i + 2]]
    told = {
        "right": [completion.tokens for completion in found] == expected,
        "versions": sorted({version for c in found for _, version in c.versions}),
        "none": sampler.generate([] if engine.rank else PROMPTS[:1], replace(PARAMS, n=1)) == []
        or engine.rank == 0,
        "lost": "",
    }
    if server:
        server.fail = {"/inference/v1/generate": 10**6}
    sampler.serving.config = replace(sampler.config, wait_s=0.1)
    try:  # rank 1 asks for nothing, and ends with rank 0
        sampler.generate([] if engine.rank else PROMPTS, PARAMS)
    except SamplerLost as error:
        told["lost"] = str(error)
    gathered = engine.all_gather_objects(told)
    if engine.rank == 0:
        (Path(sys.argv[1]) / "found.json").write_text(json.dumps({"ranks": gathered}))
    exit_immediately_with(0)
