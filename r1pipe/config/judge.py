"""A generative judge: how it is asked, which prompts it reads, and how good it must be to be used."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from r1pipe.config.answerer import AnswererConfig, answerer_rules, is_server
from r1pipe.config.fields import NonNegative, Positive, Rules, Share, Strict, build
from r1pipe.config.groups import options, read
from r1pipe.core.errors import ConfigError, nearest

PROMPTS = "judge_prompts"  # the folder of conf/ with the sets of prompts
REWARDS = ("judge", "judge_harmless")  # what a judge's scores are called in stage.rewards.weights
# What each prompt may hold in braces: texts that are put there, quoted.
PLACES = {
    "pairwise": ("question", "answer_a", "answer_b"),
    "pointwise": ("question", "answer"),
    "harmless": ("question", "answer"),
    "reference": ("question", "answer", "reference"),
}


@dataclass
class JudgeConfig(AnswererConfig):
    """How the judge `judge=MODEL` is asked, and the bounds of its measured quality (`r1pipe judge MODEL`)."""

    prompts: str  # a file of conf/judge_prompts/ by its name, or the path of a .yaml file like those
    votes: Positive  # verdicts on each pair, half of them with the answers swapped; and on each answer
    max_tokens: Positive  # longest verdict with its reasons
    temperature: NonNegative  # 0: greedy, then all votes on one order are alike
    top_p: Share
    max_num_seqs: Positive  # sequences decoded together by a local judge
    min_agreement: Share  # share of held-out pairs that it must put in the right order
    min_auc: Share  # area under the ROC curve that its harmlessness scores must reach on held-out labels
    min_reference_accuracy: Share  # share of right and wrong answers that it must tell apart by a reference
    max_flips: Share  # share of pairs whose preferred answer changes when the two are swapped
    max_length_bias: Share  # how much more often it prefers the longer answer than the labels do, or less
    max_self_preference: Share  # how much more often it prefers its own answer than the labels do
    min_consistency: Share  # share of pairs that get the same verdict when they are judged again
    max_unread: Share  # share of its verdicts that cannot be read
    max_obeyed: Share  # share of pairs in which an instruction inside the worse answer makes that one win
    force: bool  # use a judge that is beyond these bounds or was not measured: a warning, no refusal


@dataclass
class FilterJudgeConfig(JudgeConfig):
    """A judge that says which samples of general prompts, for which there is no rule, are learned from."""

    general_prompts: Positive  # are sampled, besides the reasoning prompts, and join the general part
    min_score: NonNegative  # least rating of an answer; where the prompt has a reference answer it must agree


@dataclass
class LabelJudgeConfig(JudgeConfig):
    """A judge that ranks the pairs that a reward model learns from, in place of the data's labels."""

    min_margin: NonNegative  # the mean of its verdicts on a pair must be above it, or the pair is left out
    balance_lengths: bool  # leave out pairs until chosen answers are as long as rejected ones on average


@dataclass
class EvaluatorConfig(JudgeConfig):
    """A judge of a checkpoint's answers to general prompts."""

    rates: list[Literal["pointwise", "harmless"]]  # what each answer is rated for
    baseline: str | None  # whose answers are compared with: CHECKPOINT, folder, URL, or a .jsonl file of them


@dataclass
class JudgePrompt(Strict):
    """One question to a judge."""

    system: str  # who it is and what it must heed
    user: str  # the question, with the places of PLACES in braces
    verdicts: dict[str, float]  # what may stand in the last line as [[...]], and what it is worth
    reads: Literal["summary", "response"]  # the part of a response that it sees: with reasoning, or without


@dataclass
class JudgePrompts(Strict):
    """A set of prompts: the content of a file in conf/judge_prompts/."""

    nonce: bool  # the marks around quoted texts have a number that those texts cannot know
    pairwise: JudgePrompt  # which of two answers is better: above 0 for A, below 0 for B
    pointwise: JudgePrompt  # how helpful one answer is, by a rubric
    harmless: JudgePrompt  # how harmless one response is, by a rubric
    reference: JudgePrompt  # whether an answer says what the reference answer says


@cache
def prompts_of(name: str) -> JudgePrompts:
    """The prompts of this name or file. Raises ConfigError."""
    content: Any
    if name.endswith((".yaml", ".yml")):
        content = _file(Path(name))
    elif name in options(PROMPTS):
        content = read(f"{PROMPTS}/{name}")
    else:
        raise ConfigError(
            f"stage.judge.prompts={name} is no file of conf/{PROMPTS} and does not end in .yaml; "
            f"{nearest(name, options(PROMPTS))}"
        )
    prompts = build(JudgePrompts, content, name)
    for kind, places in PLACES.items():
        _check(name, kind, getattr(prompts, kind), places)
    return prompts


def _file(path: Path) -> Any:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError  # type: ignore[import-untyped]

    try:
        return OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except OSError as error:
        raise ConfigError(f"stage.judge.prompts={path} cannot be read ({error.strerror})") from None
    except (YAMLError, OmegaConfBaseException, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"stage.judge.prompts={path} is not YAML ({first}); correct it") from None


def _check(name: str, kind: str, prompt: JudgePrompt, places: tuple[str, ...]) -> None:
    found = re.findall(r"\{(\w+)\}", prompt.user)
    if sorted(found) != sorted(places):
        raise ConfigError(
            f"{name}: {kind}.user must have each of {', '.join(f'{{{place}}}' for place in places)} once, "
            f"and nothing else in braces; it has {', '.join(f'{{{place}}}' for place in found) or 'none'}"
        )
    if len({*prompt.verdicts.values()}) < 2:
        raise ConfigError(f"{name}: {kind}.verdicts must have two values or more, or nothing is told apart")
    for label in prompt.verdicts:
        if not label.strip() or set("[]\n") & set(label) or label != label.strip():
            raise ConfigError(f"{name}: {kind}.verdicts: {label!r} must have no [ ] and no blanks around it")
    if kind == "pairwise" and not min(prompt.verdicts.values()) < 0 < max(prompt.verdicts.values()):
        raise ConfigError(f"{name}: pairwise.verdicts must have values above 0 for A and below 0 for B")


def version_of(prompts: JudgePrompts) -> str:
    """SHA-256 of the prompts: a judge that is asked otherwise is another judge."""
    return hashlib.sha256(json.dumps(asdict(prompts), sort_keys=True).encode()).hexdigest()


def judge_rules(name: str | None, judge: JudgeConfig | None, zero_level: int) -> Rules:
    """`name` is the value of `judge=`."""
    if judge is None or name is None:
        return
    yield from answerer_rules("judge", name, "stage.judge", judge)
    if judge.top_p == 0:
        yield "stage.judge.top_p=0 leaves nothing to draw; it must be above 0"
    if not is_server(name) and zero_level == 3:
        yield (
            "judge=CHECKPOINT needs engine.zero_level below 3, as ranks ask it at different times; "
            "or serve it and give judge=URL"
        )
    if isinstance(judge, EvaluatorConfig) and not judge.rates and judge.baseline is None:
        yield "stage.judge.rates=[] leaves nothing to judge; give stage.judge.baseline, too, or a kind"
    if isinstance(judge, EvaluatorConfig):
        yield from answerer_rules("stage.judge.baseline", judge.baseline, "stage.judge", judge)
    prompts = prompts_of(judge.prompts)
    if isinstance(judge, FilterJudgeConfig):
        best = max(prompts.pointwise.verdicts.values())
        if judge.min_score > best:
            yield f"stage.judge.min_score={judge.min_score:g} is above the best rating, {best:g}"
    if isinstance(judge, LabelJudgeConfig):
        best = max(map(abs, prompts.pairwise.verdicts.values()))
        if judge.min_margin >= best:
            yield f"stage.judge.min_margin={judge.min_margin:g}: no verdict is worth more than {best:g}"
