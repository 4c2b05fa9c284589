"""The 20 distillation methods, as data: each `stage.extract` with each `stage.transfer`."""

from dataclasses import dataclass

EXTRACTS = ("label", "expand", "curate", "distribution", "feedback")
TRANSFERS = ("sft", "divergence", "rl", "ranking")


@dataclass(frozen=True)
class Method:
    """What is extracted from a teacher, and how it is transferred to a student."""

    supported: bool  # false: refused
    text: str  # what it does, or why it is refused and what to give instead
    live: bool = False  # the teacher is read while the student trains: it must be a checkpoint


METHODS: dict[tuple[str, str], Method] = {
    ("label", "sft"): Method(True, "the student imitates the teacher's answers (R1 section 2.4)"),
    ("label", "divergence"): Method(True, "towards the teacher's distribution along its answers", live=True),
    ("label", "rl"): Method(True, "correctness, by the teacher's majority answer where the data has none"),
    ("label", "ranking"): Method(True, "the teacher's answer is preferred to the student's own"),
    ("expand", "sft"): Method(True, "the student imitates answers to problems that the teacher made up"),
    ("expand", "divergence"): Method(
        True, "towards the teacher's distribution on its new problems", live=True
    ),
    ("expand", "rl"): Method(True, "correctness on new problems, by the teacher's majority answer"),
    ("expand", "ranking"): Method(True, "on new problems the teacher's answer is preferred to the student's"),
    ("curate", "sft"): Method(True, "the student imitates answers on the topics, or from the documents"),
    ("curate", "divergence"): Method(
        True, "towards the teacher's distribution on topics and documents", live=True
    ),
    ("curate", "rl"): Method(
        False,
        "no rule can check prose on a topic or from a document; give stage.transfer=sft or ranking, or let "
        "the teacher score it: stage.extract=feedback",
    ),
    ("curate", "ranking"): Method(True, "the teacher's answer on a topic is preferred to the student's"),
    ("distribution", "sft"): Method(
        False,
        "it would not use the probabilities; give stage.extract=label, or stage.transfer=divergence, whose "
        "forward KL is SFT on the whole distribution",
    ),
    ("distribution", "divergence"): Method(
        True, "towards the stored top-k probabilities, or those of the teacher as it is read live"
    ),
    ("distribution", "rl"): Method(
        True, "on-policy distillation: the per-token reverse KL to the teacher is the advantage", live=True
    ),
    ("distribution", "ranking"): Method(
        False,
        "a ranking is of whole answers; give stage.extract=feedback stage.feedback.by=likelihood, which "
        "ranks them by the same probabilities",
    ),
    ("feedback", "sft"): Method(True, "on the student's answers as the teacher corrected or liked them"),
    ("feedback", "divergence"): Method(
        False,
        "a score has no distribution; give stage.extract=distribution, whose on-policy share is of the "
        "student's own answers",
    ),
    ("feedback", "rl"): Method(True, "the teacher's scores of the student's answers are the rewards"),
    ("feedback", "ranking"): Method(True, "pairs of the student's answers, by the teacher's scores"),
}
