"""The policy: what a short probe earns, sampler beside trainer before and after a step, save and load."""

from dataclasses import replace
from pathlib import Path

import torch

from r1pipe.core.types import Status
from r1pipe.doctor.context import Context, graded
from r1pipe.model import load_pretrained, save_pretrained
from r1pipe.model.names import published_tensors
from r1pipe.model.transformer import DeepseekV3
from r1pipe.rewards import is_verifiable
from r1pipe.runs import checkpoints
from r1pipe.runs.checkpoints import ENGINE
from r1pipe.runs.findings import FAIL, PASS, WARN, Finding
from r1pipe.train.rl.advantages import has_variance, is_scored
from r1pipe.train.rl.routing import routing_agreement
from r1pipe.train.rl.update import completion_logprobs, prepare, update


def truncation(context: Context, name: str) -> Finding:
    """Share of the probe's completions that were cut off; under a cap of the probe's own an upper bound."""
    completions = [one for group in context.probe.groups for one in group.completions]
    share = sum(one.truncated for one in completions) / len(completions)
    asked, given = context.run.stage.sampling.max_tokens, context.trial.stage.sampling.max_tokens
    shown = f"{share:.0%} of {len(completions)} completions are cut off at {given:,} tokens"
    remedy = (
        "raise stage.sampling.max_tokens, punish it (stage.rewards.truncation_penalty) "
        "or start from a cold start"
    )
    found = graded(name, share, context.limits.truncation, shown, remedy)
    if given < asked and found.status == FAIL:
        return Finding(name, WARN, shown, f"the stage allows {asked:,}: try an evaluation first")
    return found


def variance(context: Context, name: str) -> Finding:
    """Share of groups with different rewards: the others teach nothing. A probe of right answers alone, or
    of none, is a warning too: then only format and language differ. PPO compares with what was expected, so
    that all completions are one group."""
    groups = [group for group in context.probe.groups if is_verifiable(group.prompt)]
    rewards = [reward for group in groups for reward in group.rewards]
    known = [reward for reward in rewards if is_scored(reward)]
    if not known:
        details = [
            score.detail for score in groups[0].scores[0].values() if score.status is not Status.SCORED
        ]
        return Finding(name, FAIL, "no completion could be scored", f"mend the verifier: {details[0]}")
    grouped = context.config.stage.algorithm == "grpo"  # type: ignore[attr-defined]
    compared = [group.rewards for group in groups] if grouped else [rewards]
    share = sum(map(has_variance, compared)) / len(compared)
    scores = [score["accuracy"] for group in groups for score in group.scores if "accuracy" in score]
    right = sum(score.value for score in scores if score.status is Status.SCORED) / max(1, len(scores))
    shown = f"{share:.0%} of {len(groups)} groups differ; " if grouped else f"{len(known)} completions: "
    shown += f"rewards {min(known):.2f} to {max(known):.2f}, "
    shown += f"{right:.0%} of answers right"
    if len(known) < len(rewards):
        shown += f", {len(rewards) - len(known)} of {len(rewards)} not scored"
    remedy = "choose problems that are sometimes solved (data.levels, data=)"
    remedy += ", or raise stage.group_size" if grouped else ""
    found = graded(name, share, context.limits.variance, shown, remedy)
    return replace(found, status=WARN, remedy=remedy) if found.status == PASS and right in (0, 1) else found


def logprobs(context: Context, name: str) -> Finding:
    """How far the trainer's log-probabilities of drawn tokens are from the sampler's."""
    gap = context.trained[
        "sampling/sampling_logp_difference/mean"
    ]  # of the step's beginning, before any weight moved
    return _gap_finding(context, name, gap, f"{gap:.1e} nats a token apart")


def routing(context: Context, name: str) -> Finding:
    """Share of the sampler's choices of experts that are the trainer's too."""
    rollouts, count = context.probe.rollouts, context.limits.probe_group
    found = routing_agreement(context.engine, rollouts, context.trial.stage, count)
    if not found:
        return Finding(name, PASS, "no token was routed")
    share = found["train/routing_agreement"]
    remedy = "sampler and trainer choose other experts: try engine.precision=fp32, or weigh it by"
    remedy += " stage.importance_cap=2"
    return graded(name, share, context.limits.routing, f"{share:.2%} of the experts are the same", remedy)


def after_sync(context: Context, name: str) -> Finding:
    """The same after an optimizer step: a sampler that still had the old weights would be off."""
    context.trained  # noqa: B018 - the step
    moved = moved_by_step(context)
    fresh = context.draw().rollouts
    gap = update(context.engine, fresh, context.trial.stage, None)["sampling/sampling_logp_difference/mean"]
    shown = f"{gap:.1e} nats a token apart, after a step that moved them by {moved:.1e}"
    found = _gap_finding(context, name, gap, shown)
    if found.status == PASS and moved <= context.limits.logprob_gap[context.config.engine.precision].fail:
        return Finding(
            name, WARN, shown, "too small a step to tell; raise probe_lr in conf/doctor/limits.yaml"
        )
    return found


def _gap_finding(context: Context, name: str, gap: float, shown: str) -> Finding:
    precision = context.config.engine.precision
    remedy = "sampler and trainer do not have the same weights or precision; try engine.precision=fp32 or"
    remedy += " engine.graphs=false, and report it"
    return graded(name, gap, context.limits.logprob_gap[precision], shown, remedy)


@torch.no_grad()
def moved_by_step(context: Context) -> float:
    """Mean distance between the probe's log-probabilities when it was drawn and now."""
    engine, stage = context.engine, context.trial.stage
    total, tokens = 0.0, 0
    for micro in prepare(engine, context.probe.rollouts, stage, None):
        now_N = completion_logprobs(engine.module, micro, stage.sampling.temperature)
        total += float((now_N - micro.old_N).abs().sum())
        tokens += len(micro.old_N)
    total, count = engine.sum_over_ranks([total, tokens])
    return total / max(1.0, count)


def round_trip(context: Context, name: str) -> Finding:
    """A checkpoint as the stage writes it, verified, read back and compared weight by weight, and resumed."""
    run, engine = context.trial, context.engine
    if engine.rank == 0:
        run.folder.metrics.unlink(missing_ok=True)
    run.log(1, {})  # a checkpoint is taken up with the lines of its steps, each once
    target = run.save_checkpoint(engine, 1, {"doctor": 1}, save_pretrained)
    run.saved()
    engine.barrier()  # rank 0 has put it in place: the others read it, too
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    checkpoints.verify(target, engine=True)
    with engine.gathered() as model:
        apart = different(model, target)
    step, state = run.resume(engine)
    with engine.gathered() as model:
        apart += [f"{weight} (resumed)" for weight in different(model, target)]
    shown = f"{size / 2**20:,.1f} MiB, of which {ENGINE}/ is for resume"
    if apart or (step, state) != (1, {"doctor": 1}):
        told = f"{apart[0]} and {len(apart) - 1} more" if apart else "the loop's state"
        return Finding(
            name, FAIL, shown, f"not read back as written: {told}; look at the disk, and report it"
        )
    return Finding(name, PASS, f"{shown}; every weight is the same")


def different(model: DeepseekV3, folder: Path) -> list[str]:
    """Published names of weights that a folder holds otherwise than the model."""
    there = dict(published_tensors(load_pretrained(folder)))
    return [
        weight
        for weight, tensor in published_tensors(model)
        if weight not in there
        or not torch.equal(there[weight], tensor.detach().cpu().to(there[weight].dtype))
    ]
