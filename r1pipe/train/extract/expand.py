"""Expansion: new problems from the data's own, and the teacher's answers to them.

Self-instruct (Wang et al., arXiv 2212.10560): the teacher goes on with a list of examples, most
of them the data's, some its own. Evol-Instruct (Xu et al., arXiv 2304.12244): it rewrites problems into
harder ones, or others. Continuation (Magpie, arXiv 2406.08464): a model that was trained on conversations
goes on where a user would speak, which takes no instruction at all.
"""

import re
from collections.abc import Sequence

from r1pipe.core.types import Prompt
from r1pipe.data.overlap import user_text
from r1pipe.rewards.accuracy import summary_of
from r1pipe.runs import samples
from r1pipe.train.extract.problems import Problems
from r1pipe.train.extract.teacher import GenerationParams
from r1pipe.train.extract.work import ANSWERS, Found, Work

PER_REQUEST = 4  # problems that an answer of self-instruct is counted on to hold
OWN_SHARE = 4  # one example in so many is a problem of the teacher's own
WORD_TOKENS = 4  # tokens that a word of a problem may take
_NUMBER = re.compile(r"^[ \t*#]*Problem[ \t]+\d+[ \t]*[:.][ \t*]*", re.MULTILINE)
_HEADING = re.compile(
    r"\A[#* ]*(?:the )?(?:rewritten|new|created) (?:problem|prompt)[#* ]*:?[ *]*\n?", re.IGNORECASE
)

Made = list[tuple[str, str | None]]  # a problem's text, and what it was rewritten from


def expand(work: Work) -> Found:
    """New problems in rounds, each of which sees what the one before has added; then answers to all."""
    run, config = work.run, work.stage.expand
    pool = [user_text(prompt) for prompt in work.data_prompts()]
    ngrams, words = work.stage.filters.ngram_overlap, (config.min_words, config.max_words)
    problems = Problems(pool, work.questions, ngrams, config.max_similarity, words)
    make = {"self_instruct": self_instruct, "evolve": evolve, "continue": continued}[config.way]
    who = work.teacher.identity
    fresh: list[str] = []  # of the last round
    for number in range(config.rounds):
        wanted = config.problems - len(problems.prompts)
        if wanted <= 0:
            break
        made = make(work, number, wanted, pool, fresh)
        new = [
            problems.add(text, samples.TEACHER + who.name, who.licence or None, like) for text, like in made
        ]
        fresh = [prompt.question for prompt in new if prompt is not None] or fresh
        run.progress("new problems", min(len(problems.prompts), config.problems), config.problems, "problems")
    prompts = problems.prompts[: config.problems]
    rows, funnel, _ = work.kept(prompts, work.teacher.generate(ANSWERS, prompts, work.answers()))
    return Found(rows, [*problems.funnel.steps("problems made"), *funnel])


def self_instruct(work: Work, number: int, wanted: int, pool: Sequence[str], fresh: Sequence[str]) -> Made:
    """Problems that the teacher puts after a list of examples."""
    config, rng = work.stage.expand, work.run.rng("examples", number)
    requests = []
    for _ in range(-(-wanted // PER_REQUEST)):
        own = min(len(fresh), config.shots // OWN_SHARE)
        chosen = [pool[i] for i in rng.permutation(len(pool))[: config.shots - own]]
        chosen += [fresh[i] for i in rng.permutation(len(fresh))[:own]]
        examples = [f"Problem {n}: {text}" for n, text in enumerate(chosen, 1)]
        text = "\n\n".join([*examples, f"Problem {len(chosen) + 1}:"])
        requests.append(_request(work.stage.templates.self_instruct.replace("{examples}", text)))
    replies = work.teacher.generate(f"problems-{number}", requests, _drawing(work, PER_REQUEST))
    return [(text, None) for [reply] in replies for text in listed(summary_of(reply.text), reply.truncated)]


def listed(reply: str, truncated: bool) -> list[str]:
    """The problems in a reply that goes on with a numbered list; the last of a cut-off one is left out."""
    texts = [text.strip() for text in _NUMBER.split(reply)]
    texts = [text for text in texts if text]
    return texts[:-1] if truncated else texts


def evolve(work: Work, number: int, wanted: int, pool: Sequence[str], fresh: Sequence[str]) -> Made:
    """Problems that the teacher rewrote: those of the round before, or the data's."""
    rng, templates = work.run.rng("examples", number), work.stage.templates.evolve
    sources, ways = fresh or pool, [*templates.values()]
    parents = [sources[int(rng.integers(len(sources)))] for _ in range(wanted)]
    requests = [_request(ways[int(rng.integers(len(ways)))].replace("{problem}", text)) for text in parents]
    replies = work.teacher.generate(f"problems-{number}", requests, _drawing(work))
    return [
        ("" if reply.truncated else _HEADING.sub("", summary_of(reply.text)), parent)
        for [reply], parent in zip(replies, parents, strict=True)
    ]


def continued(work: Work, number: int, wanted: int, pool: Sequence[str], fresh: Sequence[str]) -> Made:
    """Problems that the teacher draws as a user's own words."""
    return [
        (text, None) for text in work.teacher.users_words(f"problems-{number}", [()] * wanted, _drawing(work))
    ]


def _drawing(work: Work, problems: int = 1) -> GenerationParams:
    config, most = work.stage.expand, work.stage.sampling.max_tokens
    return GenerationParams(min(most, WORD_TOKENS * problems * config.max_words), config.temperature)


def _request(text: str) -> Prompt:
    return Prompt("", "", "", text)
