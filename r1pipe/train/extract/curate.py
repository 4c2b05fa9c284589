"""Curation: questions on topics, or on the passages of documents, and the teacher's answers to them.

For a topic the teacher is asked for a question, or, where it follows no instruction, a user's words are drawn
under a system prompt that names the topic (Magpie, arXiv 2406.08464). For a document it is asked about each
passage, and answers with the passage in view; the student learns question and answer alone (Bonito,
arXiv 2402.18334, and Genstruct).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from r1pipe.core.errors import DataError
from r1pipe.core.types import CURATED, Message, Prompt
from r1pipe.rewards.accuracy import summary_of
from r1pipe.runs import samples
from r1pipe.train.extract.problems import Problems
from r1pipe.train.extract.teacher import GenerationParams
from r1pipe.train.extract.work import ANSWERS, Found, Work

QUESTIONS = "questions"  # the name of the questions among the teacher's shards
WORD_TOKENS = 4  # tokens that a word of a question may take


@dataclass(frozen=True)
class Passage:
    """A part of a document."""

    text: str
    source: str  # FILE:LINE of its beginning


def curate(work: Work) -> Found:
    """Questions that pass the filters, and the answers to them; no rule checks those."""
    config, who = work.stage.curate, work.teacher.identity
    words = (config.min_words, config.max_words)
    problems = Problems([], work.questions, work.stage.filters.ngram_overlap, config.max_similarity, words)
    prompts, requests = [], []
    for question, passage in from_documents(work) if config.documents else from_topics(work):
        source = passage.source if passage else samples.TEACHER + who.name
        prompt = problems.add(question, source, who.licence or None)
        if prompt is None:
            continue
        prompts.append(replace(prompt, task=CURATED, id=prompt.id.replace(prompt.task, CURATED, 1)))
        if passage:
            asked = work.stage.templates.passage_answer.replace("{question}", question)
            requests.append(Prompt("", "", "", asked.replace("{passage}", passage.text)))
        else:
            requests.append(prompts[-1])
    answers = work.teacher.generate(ANSWERS, requests, work.answers())
    rows, funnel, _ = work.kept(prompts, answers)
    return Found(rows, [*problems.funnel.steps("questions made"), *funnel])


def from_topics(work: Work) -> Iterator[tuple[str, None]]:
    """Questions, topic by topic."""
    config, templates = work.stage.curate, work.stage.templates
    how = GenerationParams(WORD_TOKENS * config.max_words, config.temperature)
    if config.way == "continue":
        systems = [templates.topic_system.replace("{topic}", topic) for topic in config.topics]
        contexts = [(Message("system", text),) for text in systems for _ in range(config.questions_per_topic)]
        for text in work.teacher.users_words(QUESTIONS, contexts, how):
            yield text, None
        return
    requests = [Prompt("", "", "", templates.topic.replace("{topic}", topic)) for topic in config.topics]
    replies = work.teacher.generate(QUESTIONS, requests, replace(how, n=config.questions_per_topic))
    for reply in (reply for each in replies for reply in each):
        yield "" if reply.truncated else summary_of(reply.text), None


def from_documents(work: Work) -> Iterator[tuple[str, Passage]]:
    """Questions, passage by passage."""
    config = work.stage.curate
    assert config.documents is not None
    found = list(passages(Path(config.documents), config.passage_words))
    template = work.stage.templates.passage_question
    requests = [Prompt("", "", "", template.replace("{passage}", passage.text)) for passage in found]
    how = GenerationParams(WORD_TOKENS * config.max_words, config.temperature, n=config.questions_per_passage)
    for passage, replies in zip(found, work.teacher.generate(QUESTIONS, requests, how), strict=True):
        for reply in replies:
            yield "" if reply.truncated else summary_of(reply.text), passage


def passages(path: Path, most_words: int) -> Iterator[Passage]:
    """The passages of a text file, or of JSON lines with a column `text`: paragraphs, joined while they fit,
    cut where one does not. Raises DataError naming file and line."""
    for line, document in _documents(path):
        joined: list[str] = []
        begins = line
        for offset, paragraph in _paragraphs(document):
            words = paragraph.split()
            if joined and len(joined) + len(words) > most_words:
                yield Passage(" ".join(joined), f"{path.name}:{begins}")
                joined = []
            if not joined:
                begins = line + offset if path.suffix != ".jsonl" else line
            joined += words
            while len(joined) > most_words:
                yield Passage(" ".join(joined[:most_words]), f"{path.name}:{begins}")
                joined = joined[most_words:]
        if joined:
            yield Passage(" ".join(joined), f"{path.name}:{begins}")


def _documents(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of each document."""
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"stage.curate.documents={path} cannot be read ({error.strerror}); give a file"
        ) from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); convert it") from None
    if not content.strip():
        raise DataError(f"stage.curate.documents={path} is empty; give a file with text")
    if path.suffix != ".jsonl":
        yield 1, content
        return
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number} is not JSON: {error}; correct it") from None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise DataError(f"{path}:{number} has no text in a column `text`; add it, or leave the line out")
        yield number, row["text"]


def _paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """(line, counted from 0; text) of what empty lines set apart."""
    begins = 0
    lines: list[str] = []
    for number, line in enumerate([*text.splitlines(), ""]):
        if line.strip():
            begins = number if not lines else begins
            lines.append(line)
        elif lines:
            yield begins, "\n".join(lines)
            lines = []
