"""vLLM as the sampler of engine.sampler=vllm: a server in its own environment, reached by HTTP."""
