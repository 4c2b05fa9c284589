"""Our side of every case, through the same calls that a stage makes, and where the time of a step goes."""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from bench.config import Job
from bench.turns import DTYPES, EOS, PAD, Turns, completions, rows
from r1pipe.config import RLConfig, RunConfig
from r1pipe.config.compose import compose
from r1pipe.core.types import Completion
from r1pipe.model import Policy, load_pretrained
from r1pipe.train.engine.engine import Engine
from r1pipe.train.rl.advantages import group_advantages
from r1pipe.train.rl.batch import Rollout, collate
from r1pipe.train.rl.update import Reference, update
from r1pipe.train.rollout import SamplingParams
from r1pipe.train.rollout.batching import Batcher

MICRO_TOKENS = 2048  # of the laptop recipe: micro-batches that stay in the cache
KINDS = ("GEMMs", "quantisation", "attention", "other")  # of kernels
ATTENTION = re.compile("attention|flash|fmha|flex")  # tried first: its kernels are made of matrix products
PRODUCTS = re.compile(r"gemm|nvjet|cutlass|xmma|\b_?(?:scaled_|grouped_|add|b)?mm\b")


def work(job: Job, turns: Turns) -> dict[str, Any] | None:
    """Answer turns with the case of the job."""
    kinds = {"sample": _sample, "train": _train, "grpo": _grpo, "update": _update}
    kinds |= {"matmul": _matmul, "copy": _copy}
    return kinds[job.case.kind](job, turns)


def _matmul(job: Job, turns: Turns) -> None:
    """A large square product: the peak that speeds are a share of."""
    side = job.case.prompt
    left = torch.randn(side, side, dtype=getattr(torch, DTYPES[job.setting.dtype]), device=job.device)
    right = torch.randn_like(left)
    turns.run(lambda: left @ right)


def _copy(job: Job, turns: Turns) -> None:
    """Reads and writes of `prompt` bytes each: the bandwidth of memory."""
    source = torch.ones(job.case.prompt, dtype=torch.uint8, device=job.device)
    target = torch.zeros_like(source)
    turns.run(lambda: target.copy_(source))


def _prompts(job: Job) -> list[list[int]]:
    return rows(job.case.sequences // job.case.group, job.case.prompt, job.vocab_size)


def _sample(job: Job, turns: Turns) -> None:
    model = load_pretrained(job.weights).to(getattr(torch, DTYPES[job.setting.dtype])).to(job.device)
    graphs = _composed(job).engine.graphs
    sampler = Batcher(model, EOS, PAD, max_num_seqs=job.case.sequences, graphs=graphs)
    params = SamplingParams(max_tokens=job.case.new, ignore_eos=True)
    turns.run(lambda: sampler.generate(_prompts(job), params))


def _composed(job: Job) -> RunConfig:
    """The config of a grpo stage, with the setting's options as keys of its engine."""
    overrides = {
        "ranks": "1",
        "threads": str(job.threads),
        "precision": job.setting.dtype,
        **({"zero_level": "1"} if job.setting.dtype != "fp32" else {}),  # float32 masters
        **job.setting.options,
    }
    engine = "gpu" if job.device == "cuda" else "cpu"
    given = [f"engine.{key}={value}" for key, value in overrides.items()]
    return compose(["stage=grpo", f"engine={engine}", *given]).config


def _engine(job: Job, model: Policy) -> tuple[Engine, RLConfig]:
    """The engine of a grpo stage, at a constant learning rate."""
    config = _composed(job)
    assert isinstance(config.stage, RLConfig)
    stage = config.stage
    return Engine(model, stage.optim, stage.router, config.engine, total_steps=100), stage


def _train(job: Job, turns: Turns) -> dict[str, Any]:
    """One optimizer step per turn, on the same rows. Reports the last loss and, in FP8, what took time."""
    model = load_pretrained(job.weights).to(job.device)
    engine, _ = _engine(job, model)
    tokens_BT = torch.tensor(rows(job.case.sequences, job.case.prompt + 1, job.vocab_size), device=job.device)

    def loss() -> Tensor:
        hidden_BTD = model.hidden(tokens_BT[:, :-1])
        targets_N = tokens_BT[:, 1:].flatten()
        logprobs_N = model.lm_head(hidden_BTD.flatten(0, 1), targets_N)
        return -logprobs_N.sum() / (job.case.sequences * job.case.prompt)

    losses = []
    turns.run(lambda: losses.append(engine.train_step([loss]).loss))
    facts: dict[str, Any] = {"loss": losses[-1]}
    if job.setting.dtype == "fp8":
        facts["shares"] = shares(lambda: engine.train_step([loss]), job.device == "cuda")
    return facts


def _grpo(job: Job, turns: Turns) -> None:
    """Sample, reward (the share of even tokens), advantages, KL to the reference, one optimizer step."""
    case = job.case
    model = load_pretrained(job.weights).to(job.device)
    reference = Reference(load_pretrained(job.weights), _composed(job).engine)
    engine, stage = _engine(job, model)
    config = replace(stage, minibatches=1, max_tokens_per_micro_batch=MICRO_TOKENS, kl_coef=0.04)
    params = SamplingParams(max_tokens=case.new, n=case.group, ignore_eos=True)
    prompts = _prompts(job)

    def step() -> None:
        with engine.gathered() as policy:
            policy.eval()
            sampled = Batcher(policy, EOS, PAD, max_num_seqs=case.sequences).generate(prompts, params)
        rollouts = []
        for place, prompt in enumerate(prompts):
            group = sampled[place * case.group : (place + 1) * case.group]
            rewards = [sum(token % 2 == 0 for token in c.tokens) / case.new for c in group]
            rollouts += [
                Rollout(prompt, c, advantage, True)
                for c, advantage in zip(group, group_advantages(rewards, True), strict=True)
            ]
        update(engine, rollouts, config, reference)

    turns.run(step)


def _update(job: Job, turns: Turns) -> dict[str, float]:
    """Reference, loss, backward pass and optimizer step on given completions, whose old log-probabilities are
    of the weights before the first step. Reports that step's gradient norm."""
    case = job.case
    model = load_pretrained(job.weights).to(job.device)
    reference = Reference(load_pretrained(job.weights), _composed(job).engine)
    engine, stage = _engine(job, model)
    config = replace(
        stage,
        minibatches=1,
        max_tokens_per_micro_batch=MICRO_TOKENS,
        kl_coef=0.04,
        loss_aggregation="sequence",
    )
    rollouts = []
    prompts = [prompt for prompt in _prompts(job) for _ in range(case.group)]
    answers = completions(case.sequences, case.new, job.vocab_size)
    for start in range(0, case.sequences, case.group):
        group = answers[start : start + case.group]
        rewards = [sum(token % 2 == 0 for token in tokens) / len(tokens) for tokens in group]
        rollouts += [
            Rollout(prompt, Completion(tokens, [0.0] * len(tokens), "length"), advantage, True)
            for prompt, tokens, advantage in zip(
                prompts[start:], group, group_advantages(rewards, False), strict=False
            )
        ]
    micro = collate(rollouts, None, 0.0, engine.device)
    [old_N] = reference.logprobs([micro], config.sampling.temperature)
    for rollout, old_T in zip(rollouts, old_N.split(micro.lengths_B.tolist()), strict=True):
        rollout.completion.logprobs[:] = old_T.tolist()
    norms: list[float] = []
    turns.run(lambda: norms.append(update(engine, rollouts, config, reference)["train/grad_norm"]))
    return {"gradient norm": norms[0]}


def shares(step: Callable[[], object], cuda: bool) -> dict[str, float]:
    """The share of each kind in the time that `step` spends in the device's kernels.

    On a CPU kernels are torch's operators, and quantising by the reference is among the others.
    """
    known = triton_kernels()
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as record:
        step()
        if cuda:
            torch.cuda.synchronize()
    spent = dict.fromkeys(KINDS, 0.0)
    for event in record.events():
        if cuda and event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            spent[kind_of(event.name, known)] += event.time_range.elapsed_us()
        elif not cuda:
            spent[kind_of(event.name, known)] += event.self_cpu_time_total
    whole = sum(spent.values())
    return {kind: time / whole if whole else 0.0 for kind, time in spent.items()}


def kind_of(name: str, known: dict[str, str]) -> str:
    """One of KINDS, from a kernel's or an operator's name; `known` names ours."""
    if name in known:
        return known[name]
    if ATTENTION.search(name):
        return "attention"
    return "GEMMs" if PRODUCTS.search(name) else "other"


def triton_kernels() -> dict[str, str]:
    """The name of each of our Triton kernels, as far as they are imported, and its kind."""
    kinds: dict[str, str] = {}
    for module in [name for name in sys.modules if ".kernels.triton_" in name]:
        kind = "GEMMs" if module.endswith("_products") else "quantisation"
        content: dict[str, Any] = vars(sys.modules[module])
        kinds |= {name: kind for name in content if name.startswith("_") and hasattr(content[name], "fn")}
    return kinds
