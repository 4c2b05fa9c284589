"""Tripwires: early warnings of a failing RL run, with the likely cause.

Each wire is a number computed from the metrics of all steps, newest last; it trips when the number has been
beyond its limit for some steps in a row (conf/tripwires/). Two failures also end a run by themselves, later:
non-finite steps (NumericProblem past `stage.optim.max_skipped` in a row), and failed verdicts
(EnvironmentProblem past `stage.rewards.max_failed` in a step).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median

from r1pipe.config import RLConfig, WireConfig
from r1pipe.train.rl.rows import most_failed

Metrics = Mapping[str, float]
MEAN_LENGTH = "completions/mean_length"
FIRST = 3  # steps that make the baseline of lengths; before them nothing is compared
TIMES = {"time/sampling_s", "time/reward_s", "time/update_s"}


@dataclass(frozen=True)
class Tripwire:
    """A measurement and its message."""

    measure: str | Callable[[Sequence[Metrics]], float | None]  # a metric; None: nothing to compare yet
    symptom: str  # with {value} and {limit}
    cause: str  # the likely one, and the remedy
    below: bool = False  # trips below the limit instead of above it


@dataclass(frozen=True)
class Trip:
    """A wire that tripped in this step."""

    name: str
    value: float
    action: str
    message: str


def _reward_without_accuracy(steps: Sequence[Metrics]) -> float | None:
    """How far held-out accuracy is below its best while the reward is at its best."""
    measured = [step for step in steps if step.keys() >= {"eval/pass_at_1", "reward"}]
    if len(measured) < 2 or measured[-1] is not steps[-1]:
        return None
    rewards = [step["reward"] for step in measured]
    if rewards[-1] < max(rewards):
        return 0.0
    return max(step["eval/pass_at_1"] for step in measured) - measured[-1]["eval/pass_at_1"]


def _growth(steps: Sequence[Metrics]) -> float | None:
    """Mean length relative to that of the first steps."""
    lengths = [step[MEAN_LENGTH] for step in steps if MEAN_LENGTH in step]
    return lengths[-1] / max(1.0, fmean(lengths[:FIRST])) if len(lengths) > FIRST else None


def _slowness(steps: Sequence[Metrics]) -> float | None:
    """The step's time relative to the median before it, without evaluations."""
    times = [sum(step[name] for name in TIMES) for step in steps if step.keys() >= TIMES]
    return times[-1] / median(times[:-1]) if len(times) > FIRST else None


def _failed(steps: Sequence[Metrics]) -> float | None:
    """The greatest share of failed verdicts, as in `stage.rewards.max_failed`."""
    worst = most_failed(steps[-1])
    return worst[1] if worst else None


def _skipped(steps: Sequence[Metrics]) -> float:
    """Optimizer steps, of the policy and of a value model, that this step skipped."""
    before, now = (
        sum(step.get(name, 0.0) for name in ("train/skipped", "value/skipped"))
        for step in (steps[-2] if len(steps) > 1 else {}, steps[-1])
    )
    return now - before


WIRES: dict[str, Tripwire] = {
    "truncation": Tripwire(
        "completions/clipped_ratio",
        "{value:.0%} of the completions were cut off (limit {limit:.0%})",
        "they contain no answer: raise stage.sampling.max_tokens or set stage.rewards.truncation_penalty",
    ),
    "no_variance": Tripwire(
        "frac_reward_zero_std",
        "in {value:.0%} of the groups all rewards are equal (limit {limit:.0%})",
        "nothing is learned from them: the prompts are too easy or too hard, or a reward is constant",
    ),
    "entropy": Tripwire(
        "entropy",
        "the policy's entropy is {value:.3f} nats (limit {limit:g})",
        "it has stopped exploring: lower stage.optim.lr, raise stage.kl_coef, or widen the upper clip",
        below=True,
    ),
    "kl": Tripwire(
        "kl",
        "the KL to the reference is {value:.2f} nats a token (limit {limit:g})",
        "the policy has drifted away: lower stage.optim.lr or raise stage.kl_coef",
    ),
    "logprob_gap": Tripwire(
        "sampling/sampling_logp_difference/mean",
        "sampler and trainer differ by {value:.3f} nats a token (limit {limit:g})",
        "the sampler's weights are stale, or it computes something else: check precision and weight sync",
    ),
    "repetition": Tripwire(
        "completions/repetition",
        "{value:.0%} of the 4-grams in completions are repeated (limit {limit:.0%})",
        "the policy loops: look at the rollouts, and penalise it in stage.rewards",
    ),
    "reward_hacking": Tripwire(
        _reward_without_accuracy,
        "the reward is at its best, held-out accuracy {value:.1%} below its best (limit {limit:.1%})",
        "the policy may be gaming a reward: read rollouts of the highest reward",
    ),
    "length": Tripwire(
        _growth,
        "completions are {value:.1f} times as long as at the start (limit {limit:g})",
        "length is rewarded, or completions do not end: look at the rollouts and at stage.loss_aggregation",
    ),
    "verifier": Tripwire(
        _failed,
        "{value:.0%} of a reward's verdicts failed (limit {limit:.0%})",
        "the verifier or its sandbox fails: see the column `failed` of the rollouts",
    ),
    "max_vio": Tripwire(
        "router/max_vio",
        "an expert's load is {value:.1f} times the mean above the mean (limit {limit:g})",
        "routing has collapsed: raise stage.router.bias_rate",
    ),
    "non_finite": Tripwire(
        _skipped,
        "{value:.0f} optimizer steps were skipped, as their loss or gradient is not finite (limit {limit:g})",
        "the log names the layer: lower stage.optim.lr, or look at the precision; more than "
        "stage.optim.max_skipped in a row end the job",
    ),
    "slow_step": Tripwire(
        _slowness,
        "this step took {value:.1f} times the median (limit {limit:g})",
        "another job on this machine, a slow verifier, or completions that never end",
    ),
}


def _unmeasured(stage: RLConfig) -> dict[str, str]:
    """The wires that have nothing to measure in a stage, and why."""
    why = {}
    if stage.group_size == 1:
        why["no_variance"] = "stage.group_size=1: there are no groups"
    if not stage.kl_coef:
        why["kl"] = "stage.kl_coef=0: there is no reference"
    every, steps = stage.eval.every, stage.max_steps
    if not every or (steps - 1) // every < 2:  # the last step has none, and a drop takes two
        why["reward_hacking"] = f"stage.eval.every={every}: no two evaluations in {steps} steps"
    return why


class Tripwires:
    """The metrics so far, and how long each wire has been beyond its limit."""

    def __init__(
        self, config: Mapping[str, WireConfig], stage: RLConfig, name_keys: Callable[[str], str] = str
    ):
        """`name_keys`: a message with its keys as the run's own stage has them."""
        on = {name: wire for name, wire in config.items() if wire.action != "off"}
        unmeasured = _unmeasured(stage)
        self.inactive = {name: unmeasured[name] for name in on if name in unmeasured}
        self.name_keys = name_keys
        self.config = {name: wire for name, wire in on.items() if name not in unmeasured}
        self.steps: list[Metrics] = []
        self.beyond = dict.fromkeys(self.config, 0)  # steps in a row

    def describe_inactive(self) -> str:
        """One line on the wires that have nothing to measure in this run; empty if there are none."""
        idle = "; ".join(f"{name} ({why})" for name, why in self.inactive.items())
        return self.name_keys(f"tripwires with nothing to measure in this run: {idle}") if idle else ""

    def check(self, metrics: Metrics) -> list[Trip]:
        """Add a step's metrics; the wires that trip in it, once for each stretch beyond the limit."""
        self.steps.append(metrics)
        trips = []
        for name, config in self.config.items():
            wire = WIRES[name]
            value = metrics.get(wire.measure) if isinstance(wire.measure, str) else wire.measure(self.steps)
            if value is None:
                continue
            over = value < config.limit if wire.below else value > config.limit
            self.beyond[name] = self.beyond[name] + 1 if over else 0
            if self.beyond[name] == config.steps:
                symptom = wire.symptom.format(value=value, limit=config.limit)
                message = self.name_keys(f"tripwire {name}: {symptom}; {wire.cause}")
                trips.append(Trip(name, value, config.action, message))
        return trips


def messages_of(trips: Sequence[Trip], action: str) -> str:
    """The messages of the trips with this action, as one line; empty without any."""
    return "; ".join(trip.message for trip in trips if trip.action == action)
