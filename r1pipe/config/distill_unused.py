"""Keys of a distillation that the chosen method does not read: on the command line they are refused."""

from collections.abc import Iterator, Sequence

from r1pipe.config.answerer import is_server
from r1pipe.config.distill import DistillConfig
from r1pipe.config.distill_methods import EXTRACTS
from r1pipe.config.stages import StageConfig
from r1pipe.core.errors import ConfigError

# Keys, below `stage.`; and why they change nothing, with what would need them.
Unused = tuple[Sequence[str], str]

PROMPTS = ("prompts", "general_prompts", "general_kinds")
ANSWERS = ("samples_per_prompt", "sampling")
DRAWN = (  # all but sampling.max_tokens: prompts that leave no room for so many are left out
    *("samples_per_prompt", "sampling.temperature", "sampling.top_p", "sampling.max_num_seqs"),
)
FILTERS = (  # all but ngram_overlap, which prompts pass, too
    *("correct_only", "min_agreement", "well_formed", "max_paragraph", "min_language_consistency"),
    *("allow_code_blocks", "max_repetition", "per_prompt"),
)
OF_A_SERVER = (
    *("served_name", "key_variable", "timeout_s", "retries", "parallel"),
    *("usd_per_million_prompt_tokens", "usd_per_million_completion_tokens"),
)
TEMPLATES = (
    *("self_instruct", "evolve", "topic", "topic_system", "passage_question", "passage_answer"),
    *("rubric", "correction"),
)


def refuse_unused_teaching_keys(given: set[str], stage: StageConfig, teacher: str | None) -> None:
    """Raises ConfigError where a key of the command line would change nothing."""
    if not isinstance(stage, DistillConfig):
        return
    for key in sorted(given):
        if why := why_unused(key, stage, teacher):
            raise ConfigError(f"{key} would change nothing: {why}")


def why_unused(key: str, stage: DistillConfig, teacher: str | None) -> str | None:
    """Why a key of the command line would change nothing; None where it is read."""
    for names, why in unused_keys(stage, teacher):
        if any(f"{key}.".startswith(f"stage.{name}.") for name in names):
            return why
    return None


def unused_keys(stage: DistillConfig, teacher: str | None) -> Iterator[Unused]:
    """What the chosen method does not read."""
    for way in EXTRACTS:
        if way != stage.extract and hasattr(stage, way):  # label has no keys of its own
            yield (way,), f"it is of stage.extract={way}; drop it, or give stage.extract={way}"
    if teacher is None:
        names = ("teacher", "templates", "filters", *PROMPTS, *ANSWERS)
        yield names, "it needs teacher=CHECKPOINT, a folder or a URL; give one, or drop it"
        return
    if not is_server(teacher):
        yield _below("teacher", OF_A_SERVER), f"it is of a server, and teacher={teacher} is none; drop it"
    yield from _of_extract(stage)
    yield from _of_answers(stage)
    yield from _of_transfer(stage)


def _of_extract(stage: DistillConfig) -> Iterator[Unused]:
    read = templates_of(stage)
    names = [name for name in TEMPLATES if name not in read]
    yield _below("templates", names), f"this method reads {', '.join(read) or 'no template'}; drop it"
    if stage.extract == "expand" and stage.expand.way != "self_instruct":
        yield ("expand.shots",), f"stage.expand.way={stage.expand.way} shows no examples; drop it"
    if stage.extract == "curate":
        yield PROMPTS, "stage.extract=curate asks its own questions; drop it"
        if stage.curate.documents is None:
            names = ["passage_words", "questions_per_passage"]
            yield _below("curate", names), "it is of stage.curate.documents; give that, or drop it"
        else:
            names = ["topics", "questions_per_topic"]
            yield _below("curate", names), "stage.curate.documents takes their place; drop one"
    if stage.extract == "distribution" and (stage.distribution.live or stage.transfer == "rl"):
        yield ("distribution.top_k",), "the teacher is read while the student trains, and whole; drop it"
    if stage.extract == "distribution" and stage.transfer == "rl":
        yield ("distribution.live",), "with stage.transfer=rl the teacher is always read so; drop it"
    if stage.extract == "feedback":
        by, is_scored = stage.feedback.by, stage.feedback.by != "correction"
        if by == "likelihood":
            yield (
                _below("feedback", ["max_tokens", "temperature"]),
                "a likelihood is read; drop it",
            )
        if not (is_scored and stage.transfer == "sft"):
            yield ("feedback.min_score",), "it is for scores and stage.transfer=sft; drop it"


def templates_of(stage: DistillConfig) -> tuple[str, ...]:
    """The templates that the chosen method fills in."""
    match stage.extract:
        case "expand":
            return (stage.expand.way,) if stage.expand.way != "continue" else ()
        case "curate" if stage.curate.documents is not None:
            return ("passage_question", "passage_answer")
        case "curate":
            return ("topic",) if stage.curate.way == "ask" else ("topic_system",)
        case "feedback":
            return (stage.feedback.by,) if stage.feedback.by != "likelihood" else ()
    return ()


def _of_answers(stage: DistillConfig) -> Iterator[Unused]:
    """How answers are drawn and filtered, where none are."""
    if stage.reads:
        yield (*PROMPTS, *ANSWERS, "filters"), "the responses are those of stage.reads; drop one"
    elif stage.transfer == "rl" and stage.extract in ("distribution", "feedback"):
        unread = (*DRAWN, *_below("filters", FILTERS))
        yield unread, "the student draws as stage.rl.sampling says, and nothing is filtered; drop it"
    elif stage.extract == "feedback" and stage.feedback.by != "correction" and stage.transfer == "ranking":
        yield _below("filters", FILTERS), "a ranking is of all answers that have a score; drop it"


def _of_transfer(stage: DistillConfig) -> Iterator[Unused]:
    if stage.divergence:
        if stage.divergence.kind != "jensen_shannon":
            yield ("divergence.beta",), "it is of stage.divergence.kind=jensen_shannon; give that, or drop it"
        if not stage.divergence.on_policy:
            yield ("divergence.sampling",), "stage.divergence.on_policy=0 draws nothing; raise it, or drop it"
    if stage.ranking and stage.extract == "feedback":
        yield ("ranking.sampling",), "both answers of a pair are given; the student's have stage.sampling"
    if stage.ranking:
        yield ("mtp_weight",), "a ranking trains no MTP layers; drop it"
    if stage.rl and not stage.rl.teacher_coef:
        yield ("rl.teacher_discount",), "it is of stage.extract=distribution; give that, or drop it"
    if stage.rl:
        names = ("epochs", "batch_size", "mtp_weight")
        yield names, "it is of SFT; with stage.transfer=rl give stage.max_steps and stage.rl.prompts_per_step"


def _below(part: str, names: Sequence[str]) -> list[str]:
    return [f"{part}.{name}" for name in names]
