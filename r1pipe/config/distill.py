"""Distillation: what is got out of a teacher (`extract`), and what puts it into a student (`transfer`)."""

from dataclasses import dataclass
from typing import Literal

from r1pipe.config.answerer import AnswererConfig, answerer_rules, is_server
from r1pipe.config.fields import Rules
from r1pipe.config.stages import StageConfig
from r1pipe.config.transfer import TransferConfig, transfer_rules

EXTRACTS = ("label", "expand", "curate", "distribution", "feedback")
TRANSFERS = ("sft", "divergence", "rl", "ranking")


@dataclass(frozen=True)
class Pair:
    """One way out of a teacher with one way into a student."""

    runs: bool  # false: refused
    text: str  # what it does, or why it is refused and what to give instead
    live: bool = False  # the teacher is read while the student trains: it must be a checkpoint


PAIRS: dict[tuple[str, str], Pair] = {
    ("label", "sft"): Pair(True, "the student imitates the teacher's answers (R1 section 2.4)"),
    ("label", "divergence"): Pair(True, "towards the teacher's distribution along its answers", live=True),
    ("label", "rl"): Pair(True, "correctness, by the teacher's majority answer where the data has none"),
    ("label", "ranking"): Pair(True, "the teacher's answer is preferred to the student's own"),
    ("expand", "sft"): Pair(True, "the student imitates answers to problems that the teacher made up"),
    ("expand", "divergence"): Pair(True, "towards the teacher's distribution on its new problems", live=True),
    ("expand", "rl"): Pair(True, "correctness on new problems, by the teacher's majority answer"),
    ("expand", "ranking"): Pair(True, "on new problems the teacher's answer is preferred to the student's"),
    ("curate", "sft"): Pair(True, "the student imitates answers on the topics, or from the documents"),
    ("curate", "divergence"): Pair(
        True, "towards the teacher's distribution on topics and documents", live=True
    ),
    ("curate", "rl"): Pair(
        False,
        "no rule can check prose on a topic or from a document; give stage.transfer=sft or ranking, or let "
        "the teacher score it: stage.extract=feedback",
    ),
    ("curate", "ranking"): Pair(True, "the teacher's answer on a topic is preferred to the student's"),
    ("distribution", "sft"): Pair(
        False,
        "it would not use the probabilities; give stage.extract=label, or stage.transfer=divergence, whose "
        "forward KL is SFT on the whole distribution",
    ),
    ("distribution", "divergence"): Pair(
        True, "towards the stored top-k probabilities, or those of the teacher as it is read live"
    ),
    ("distribution", "rl"): Pair(
        True, "on-policy distillation: the per-token reverse KL to the teacher is the advantage", live=True
    ),
    ("distribution", "ranking"): Pair(
        False,
        "a ranking is of whole answers; give stage.extract=feedback stage.feedback.by=likelihood, which "
        "ranks them by the same probabilities",
    ),
    ("feedback", "sft"): Pair(True, "on the student's answers as the teacher corrected or liked them"),
    ("feedback", "divergence"): Pair(
        False,
        "a score has no distribution; give stage.extract=distribution, whose on-policy share is of the "
        "student's own answers",
    ),
    ("feedback", "rl"): Pair(True, "the teacher's scores of the student's answers are the rewards"),
    ("feedback", "ranking"): Pair(True, "pairs of the student's answers, by the teacher's scores"),
}


@dataclass
class DistillConfig(TransferConfig):
    """A student learns from a teacher (R1 section 2.4). Without `teacher=`, the samples of rejection sampling
    are its labels."""

    extract: Literal["label", "expand", "curate", "distribution", "feedback"]  # what the teacher gives
    teacher: AnswererConfig  # how it is asked, and what is recorded of it


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
    pair = PAIRS[stage.extract, stage.transfer]
    if not pair.runs:
        yield f"{chosen} is no way to distil: {pair.text}"
    if teacher is None and stage.extract != "label":
        yield f"stage.extract={stage.extract} needs a teacher to ask; give teacher=CHECKPOINT|DIR|URL"
    yield from transfer_rules(stage, ranks)
    if stage.rl and bool(stage.rl.teacher_coef) != pair.live:
        yield (
            f"{chosen} {'needs stage.rl.teacher_coef above 0' if pair.live else 'does not read the teacher'}: "
            f"stage.rl.teacher_coef={stage.rl.teacher_coef:g}; stage.extract=distribution does"
        )
    if pair.live and (teacher is None or is_server(teacher)):
        yield (
            f"{chosen} reads the teacher's probabilities while the student trains; give teacher=CHECKPOINT "
            "or a Hugging Face folder"
        )
