"""Distillation: what is got out of a teacher (`extract`), and what puts it into a student (`transfer`)."""

from dataclasses import dataclass
from typing import Literal

from r1pipe.config.answerer import AnswererConfig, answerer_rules, is_server
from r1pipe.config.distill_methods import METHODS
from r1pipe.config.fields import Count, NonNegative, Positive, Rules, Share, Strict
from r1pipe.config.stages import FilterConfig, SamplingConfig, StageConfig
from r1pipe.config.transfer import DivergenceConfig, TransferConfig, transfer_rules


@dataclass
class AnswerFilterConfig(FilterConfig):
    """Which of a teacher's answers are learned from: rejection sampling's filters, two of which can be left
    out for teachers that answer without a thought, and for problems that no rule can check."""

    correct_only: bool  # drop wrong answers; where there is no gold answer, those of a minority
    min_agreement: Share  # share of a new problem's answers that must agree for the majority to be its answer
    well_formed: bool  # drop answers that are no thought with a summary


@dataclass
class ExpandConfig(Strict):
    """New problems from the data's own."""

    way: Literal["self_instruct", "evolve", "continue"]  # few-shot; rewritten; drawn as a user's own words
    problems: Positive  # new ones that are wanted
    rounds: Positive  # at most; each builds on what the one before has added
    shots: Positive  # examples in a request of self_instruct, one in four of them new ones (Wang et al.: 8)
    max_similarity: Share  # ROUGE-L with another problem that makes one a near copy; 1: the same words
    min_words: Count  # shortest problem
    max_words: Positive  # longest problem
    temperature: NonNegative  # of the problems; their answers have `sampling`


@dataclass
class CurateConfig(Strict):
    """Questions on topics, or on the passages of documents."""

    way: Literal["ask", "continue"]  # it is asked for questions; or draws a user's own words
    topics: list[str]  # without documents
    questions_per_topic: Positive  # asked for, before filters
    documents: str | None  # a text file, or JSON lines with a column `text`
    passage_words: Positive  # longest passage of a document
    questions_per_passage: Positive  # asked for, before filters
    max_similarity: Share  # as in `expand`
    min_words: Count  # shortest question
    max_words: Positive  # longest question
    temperature: NonNegative  # of the questions


@dataclass
class DistributionConfig(Strict):
    """The teacher's probabilities of each token of a response."""

    top_k: Positive  # likeliest tokens that are stored; what is left over is one number
    live: bool  # store none: read the teacher, which must be a checkpoint, while the student trains


@dataclass
class FeedbackConfig(Strict):
    """What a teacher says of the student's own answers."""

    by: Literal["rubric", "likelihood", "correction"]  # a rating; its probabilities; a better answer
    min_score: Share  # least score that SFT learns from
    max_tokens: Positive  # longest rating
    temperature: NonNegative  # of ratings and corrections


@dataclass
class TemplatesConfig(Strict):
    """What the teacher is asked, with places in braces."""

    self_instruct: str  # {examples}
    evolve: dict[str, str]  # name -> a way to rewrite {problem}
    topic: str  # {topic}
    topic_system: str  # {topic}
    passage_question: str  # {passage}
    passage_answer: str  # {passage} and {question}
    rubric: str  # {question} and {answer}
    correction: str  # {question} and {answer}


PLACES = {
    "self_instruct": ("examples",),
    "topic": ("topic",),
    "topic_system": ("topic",),
    "passage_question": ("passage",),
    "passage_answer": ("passage", "question"),
    "rubric": ("question", "answer"),
    "correction": ("question", "answer"),
}


@dataclass
class DistillConfig(TransferConfig):
    """A student learns from a teacher (R1 section 2.4). Without `teacher=`, the samples of rejection sampling
    are its labels."""

    extract: Literal["label", "expand", "curate", "distribution", "feedback"]  # what the teacher gives
    teacher: AnswererConfig  # how it is asked, and what is recorded of it
    prompts: Positive  # reasoning prompts of the data: answered, or what new problems come from
    general_prompts: Count  # prompts of the general kinds that are answered besides
    general_kinds: dict[str, NonNegative]  # share of each general task; empty: as the data has them
    samples_per_prompt: Positive  # answers to each prompt
    sampling: SamplingConfig  # of the answers
    filters: AnswerFilterConfig
    expand: ExpandConfig
    curate: CurateConfig
    distribution: DistributionConfig
    feedback: FeedbackConfig
    templates: TemplatesConfig


def distill_rules(stage: StageConfig, teacher: str | None, ranks: int) -> Rules:
    """`teacher`: what the user names, null for the samples of `stage.reads`."""
    if not isinstance(stage, DistillConfig):
        if teacher is not None:
            yield f"teacher={teacher} is for stage=distill; drop it"
        return
    yield from answerer_rules("teacher", teacher, "stage.teacher", stage.teacher)
    if teacher is not None and not teacher.strip():
        yield "teacher is empty; give teacher=CHECKPOINT, a Hugging Face folder, or a server's URL"
    chosen = f"stage.extract={stage.extract} stage.transfer={stage.transfer}"
    method = METHODS[stage.extract, stage.transfer]
    if not method.supported:
        yield f"{chosen} is not a distillation method: {method.text}"
    if teacher is None and stage.extract != "label":
        yield f"stage.extract={stage.extract} needs a teacher to ask; give teacher=CHECKPOINT|DIR|URL"
    yield from reads_rules(stage, teacher)
    yield from transfer_rules(stage, ranks)
    if stage.rl and bool(stage.rl.teacher_coef) != method.live:
        remedy = "give more than 0" if method.live else "give 0, or stage.extract=distribution, which does"
        yield (
            f"stage.rl.teacher_coef={stage.rl.teacher_coef:g}, but {chosen} "
            f"{'reads' if method.live else 'does not read'} the teacher's probabilities: {remedy}"
        )
    if stage.rl and bool(stage.rl.score_weight) != (stage.extract == "feedback"):
        yield (
            f"stage.rl.score_weight={stage.rl.score_weight:g}: the teacher scores answers with "
            "stage.extract=feedback, and there alone; give more than 0 there, and 0 elsewhere"
        )
    if method.live and (teacher is None or is_server(teacher)):
        yield (
            f"{chosen} reads the teacher's probabilities while the student trains; give teacher=CHECKPOINT "
            "or a Hugging Face folder"
        )
    yield from extract_rules(stage, teacher)
    if stage.divergence and stage.extract == "distribution" and not stage.distribution.live:
        yield from stored_rules(stage.divergence)


def reads_rules(stage: DistillConfig, teacher: str | None) -> Rules:
    """Of responses that another run has made, which a teacher can only read."""
    if teacher is None or not stage.reads:
        return
    reads = f"stage.reads=[{','.join(stage.reads)}]"
    if (stage.extract, stage.transfer) != ("distribution", "divergence"):
        yield (
            f"{reads} would not be used: the teacher gives what is learned; drop it, or give "
            "stage.extract=distribution stage.transfer=divergence for its probabilities of those responses"
        )
    elif is_server(teacher):
        yield (
            f"{reads}: a server tells probabilities of its own answers alone; drop it, or give "
            "teacher=CHECKPOINT or a Hugging Face folder"
        )


def stored_rules(divergence: DivergenceConfig) -> Rules:
    """Of probabilities that are stored with the teacher's answers."""
    why = {"on_policy": "the student's own answers have none", "temperature": "the rest bears 1 alone"}
    for name, usual in (("on_policy", 0), ("temperature", 1)):
        if (value := getattr(divergence, name)) != usual:
            yield (
                f"stage.divergence.{name}={value:g} needs stage.distribution.live=true, which reads the "
                f"teacher while the student trains: of stored probabilities, {why[name]}"
            )


def extract_rules(stage: DistillConfig, teacher: str | None) -> Rules:
    """Of each `stage.extract`."""
    local = {
        "stage.expand.way=continue": stage.extract == "expand" and stage.expand.way == "continue",
        "stage.curate.way=continue": stage.extract == "curate" and stage.curate.way == "continue",
        "stage.feedback.by=likelihood": stage.extract == "feedback" and stage.feedback.by == "likelihood",
        "stage.distribution.live=true": stage.extract == "distribution" and stage.distribution.live,
    }
    for key, is_chosen in local.items():
        if is_chosen and teacher is not None and is_server(teacher):
            yield f"{key} needs the teacher's weights here; give teacher=CHECKPOINT or a Hugging Face folder"
    if stage.sampling.top_p == 0:
        yield "stage.sampling.top_p=0 leaves nothing to draw; it must be above 0"
    needs_gold = stage.filters.correct_only or stage.transfer == "rl"
    if stage.extract == "expand" and needs_gold and stage.samples_per_prompt == 1:
        yield (
            "stage.samples_per_prompt=1: the answer to a new problem is what several agree on; give 2 or "
            "more, or stage.filters.correct_only=false"
        )
    if stage.extract == "curate":
        yield from _curate_rules(stage.curate)
    if stage.extract == "feedback":
        yield from _feedback_rules(stage)
    yield from template_rules(stage)


def _curate_rules(curate: CurateConfig) -> Rules:
    if not curate.topics and curate.documents is None:
        yield "stage.extract=curate needs stage.curate.topics=[...] or stage.curate.documents=FILE"
    if curate.documents is not None and curate.way == "continue":
        yield "stage.curate.documents needs stage.curate.way=ask: a passage is asked about"


def _feedback_rules(stage: DistillConfig) -> Rules:
    transfer, is_scored = stage.transfer, stage.feedback.by != "correction"
    if not is_scored and transfer == "rl":
        yield "stage.feedback.by=correction scores nothing; give stage.transfer=sft or ranking, or by=rubric"
    if is_scored and transfer == "ranking" and stage.samples_per_prompt == 1:
        yield f"stage.transfer={transfer} compares answers; give stage.samples_per_prompt=2 or more"


def template_rules(stage: DistillConfig) -> Rules:
    """What is asked about must have a place in each template."""
    templates = stage.templates
    texts = {name: (getattr(templates, name), places) for name, places in PLACES.items()}
    texts |= {f"evolve.{name}": (text, ("problem",)) for name, text in templates.evolve.items()}
    for name, (text, places) in texts.items():
        for place in places:
            if f"{{{place}}}" not in text:
                yield f"stage.templates.{name} has no {{{place}}}: the teacher would not see what it is asked"
    if stage.extract == "expand" and stage.expand.way == "evolve" and not templates.evolve:
        yield "stage.templates.evolve is empty; give at least one way to rewrite a problem"
