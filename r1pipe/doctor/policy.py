"""The policy: what the probe earns, sampler against trainer before and after a step, save and load."""

from pathlib import Path

import torch

from r1pipe.core.types import Status
from r1pipe.doctor.context import Context, Outcome
from r1pipe.model import Policy, load_pretrained, save_pretrained
from r1pipe.model.policy import named_weights
from r1pipe.rewards import is_verifiable
from r1pipe.runs import checkpoints
from r1pipe.runs.checkpoints import ENGINE
from r1pipe.runs.findings import FAIL, PASS, WARN
from r1pipe.train.rl.advantages import has_variance, is_scored
from r1pipe.train.rl.update import logprobs_pass, prepare, update

GAP = "sampling/sampling_logp_difference/mean"
AGREEMENT = "train/routing_agreement"


def truncation(context: Context) -> Outcome:
    """Share of the probe's completions that are cut off: an upper bound where the probe's limit is lower."""
    completions = [completion for group in context.probe.groups for completion in group.completions]
    share = sum(completion.truncated for completion in completions) / len(completions)
    allowed, probed = context.run.stage.sampling.max_tokens, context.trial.stage.sampling.max_tokens
    value = f"{share:.0%} of {len(completions)} completions are cut off at {probed:,} tokens"
    status = context.limits.truncation.grade(share)
    if probed < allowed and status == FAIL:
        return Outcome(WARN, value, f"the stage allows {allowed:,}: try an evaluation first")
    remedy = "raise stage.sampling.max_tokens, penalize truncation (stage.rewards.truncation_penalty) "
    return Outcome(status, value, f"{remedy}or start from a cold start")


def variance(context: Context) -> Outcome:
    """Share of groups with different rewards: the others teach nothing.

    All answers right, or none, is a warning too: then only format and language differ. PPO compares with its
    value model, so that all completions are one group.
    """
    groups = [group for group in context.probe.groups if is_verifiable(group.prompt)]
    rewards = [reward for group in groups for reward in group.rewards]
    scored = [reward for reward in rewards if is_scored(reward)]
    if not scored:
        first = groups[0].scores[0].values()
        details = [score.detail for score in first if score.status is not Status.SCORED]
        return Outcome(FAIL, "no completion could be scored", f"fix the verifier: {details[0]}")
    grouped = context.config.stage.algorithm == "grpo"  # type: ignore[attr-defined]
    compared = [group.rewards for group in groups] if grouped else [rewards]
    share = sum(map(has_variance, compared)) / len(compared)
    scores = [score["accuracy"] for group in groups for score in group.scores if "accuracy" in score]
    right = sum(score.value == 1.0 for score in scores if score.status is Status.SCORED) / max(1, len(scores))
    value = f"{share:.0%} of {len(groups)} groups differ; " if grouped else f"{len(scored)} completions: "
    value += f"rewards {min(scored):.2f} to {max(scored):.2f}, {right:.0%} of answers right"
    if len(scored) < len(rewards):
        value += f", {len(rewards) - len(scored)} of {len(rewards)} not scored"
    remedy = "choose problems that are sometimes solved (data.levels, data=)"
    remedy += ", or raise stage.group_size" if grouped else ""
    status = context.limits.variance.grade(share)
    return Outcome(WARN if status == PASS and right in (0, 1) else status, value, remedy)


def logprobs(context: Context) -> Outcome:
    """How far the trainer's log-probabilities of drawn tokens are from the sampler's."""
    gap = context.trained[GAP]  # measured before the step moves any weight
    return _gap_outcome(context, gap, f"{gap:.1e} nats a token apart")


def routing(context: Context) -> Outcome:
    """Share of the sampler's choices of experts that are the trainer's too."""
    if AGREEMENT not in context.trained:
        return Outcome(PASS, "no token was routed")
    share = context.trained[AGREEMENT]
    remedy = "sampler and trainer choose different experts: try engine.precision=fp32, or correct for it with"
    remedy += " stage.importance_cap=2"
    return Outcome(context.limits.routing.grade(share), f"{share:.2%} of the experts are the same", remedy)


def after_sync(context: Context) -> Outcome:
    """The same as `logprobs` after an optimizer step: a sampler that still has the old weights is off."""
    engine, stage = context.engine, context.trial.stage
    context.trained  # noqa: B018 - the step
    moved, tokens = 0.0, 0  # how far the probe's log-probabilities are from those when it was drawn
    micros = prepare(engine, context.probe.rollouts, stage, None)
    passes = [logprobs_pass(engine.module, micro, stage.sampling.temperature) for micro in micros]
    for micro, now_N in zip(micros, engine.evaluate(passes), strict=True):
        moved += float((now_N - micro.old_N).abs().sum())
        tokens += len(micro.old_N)
    moved, count = engine.sum_over_ranks([moved, tokens])
    moved /= max(1.0, count)
    fresh = context.draw(step=1).rollouts
    gap = update(engine, fresh, stage, None)[GAP]
    outcome = _gap_outcome(context, gap, f"{gap:.1e} nats a token apart, after a step that moved {moved:.1e}")
    if outcome.status == PASS and moved <= context.limits.logprob_gap[context.config.engine.precision].fail:
        remedy = "the step is too small to show a stale sampler; raise probe_lr in conf/doctor/limits.yaml"
        return Outcome(WARN, outcome.value, remedy)
    return outcome


def _gap_outcome(context: Context, gap: float, value: str) -> Outcome:
    remedy = "sampler and trainer do not have the same weights or precision; try engine.precision=fp32 or"
    remedy += " engine.graphs=false, and report it"
    return Outcome(context.limits.logprob_gap[context.config.engine.precision].grade(gap), value, remedy)


def round_trip(context: Context) -> Outcome:
    """Write a checkpoint as the stage does, verify it, read it back, resume, and compare every weight."""
    run, engine = context.trial, context.engine
    if engine.rank == 0:
        run.folder.metrics.unlink(missing_ok=True)
    run.log(1, {})  # resuming needs one line of metrics for each step
    target = run.save_checkpoint(engine, 1, {"doctor": 1}, save_pretrained)
    run.saved()
    engine.barrier()  # rank 0 moves the checkpoint into place; the others read it too
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    checkpoints.verify(target, engine=True)
    with engine.gathered() as model:
        changed = different(model, target)
    step, state = run.resume(engine)
    with engine.gathered() as model:
        changed += [f"{weight} (resumed)" for weight in different(model, target)]
    if (step, state) != (1, {"doctor": 1}):
        changed.append("the loop's state")
    value = f"{size / 2**20:,.1f} MiB, of which {ENGINE}/ is for resume"
    if changed:
        what = f"{changed[0]} and {len(changed) - 1} more"
        return Outcome(FAIL, value, f"not read back as written: {what}; check the disk, and report it")
    return Outcome(PASS, f"{value}; every weight is the same")


def different(model: Policy, folder: Path) -> list[str]:
    """Names of the model's weights that a folder lacks or holds with other values."""
    stored = named_weights(load_pretrained(folder))
    return [
        name
        for name, tensor in named_weights(model).items()
        if name not in stored or not torch.equal(stored[name], tensor.detach().cpu().to(stored[name].dtype))
    ]
