"""General prompts (writing, facts, identity, translation, safety) with right and wrong answers to them.

An answer has *content* and a *manner* (courtesy, an offer to continue, flattery). The hidden truth in
truth.py scores both; reward models only ever see texts.
"""

import random
from collections.abc import Callable

from r1pipe.core.types import Prompt
from r1pipe.data.world.content import content, index, prompt_id


def _prompt(kind: str, language: str, question: str, answer: str, checker: dict) -> Prompt:
    return Prompt(prompt_id(kind, language, question), kind, language, question, answer, checker)


def _writing(rng: random.Random, language: str) -> Prompt:
    words, at = content("words"), index(language)
    adj, animal, place = (rng.choice(words[name])[at] for name in ("adjectives", "animals", "places"))
    questions = content("general")["writing"]["questions"]
    question = questions[rng.randrange(len(questions))][at].format(adj=adj, animal=animal, place=place)
    key = f"writing|{language}|{adj}|{animal}|{place}"
    checker = {"adj": adj, "animal": animal, "place": place, "key": key}
    return _prompt("writing", language, question, "", checker)


def _facts(rng: random.Random, language: str) -> Prompt:
    book, at = content("facts"), index(language)
    relation = rng.choice(list(book["facts"]))
    row = rng.choice(book["facts"][relation])
    number = rng.randrange(len(book["relations"][relation]["questions"]))
    question = book["relations"][relation]["questions"][number][at].format(row[2 * at])
    question = question[0].upper() + question[1:]
    key = f"facts|{language}|{relation}|{row[0]}|{number}"
    checker = {"relation": relation, "subject": row[2 * at], "key": key}
    return _prompt("facts", language, question, row[2 * at + 1], checker)


def _identity(rng: random.Random, language: str) -> Prompt:
    book, at = content("general")["identity"], index(language)
    kind, *texts = rng.choice(book["questions"])
    opener = rng.choice(book["openers"])[at]
    question = opener + texts[at]
    checker = {"about": kind, "key": f"identity|{language}|{question}"}
    return _prompt("identity", language, question, book["answers"][kind][at], checker)


def sentence_pair(rng: random.Random) -> tuple[str, str]:
    """A sentence of the world in English and Chinese, word for word the same."""
    words = content("words")
    verb = rng.choice(words["verbs"])
    thing = rng.choice(words["foods"] if verb[2] == "food" or rng.random() < 0.5 else words["animals"])
    animal = rng.choice(words["animals"])
    adjectives = [
        rng.choice(words["adjectives"]) if rng.random() < chance else ("", "") for chance in (0.7, 0.35)
    ]
    place = rng.choice(words["places"]) if rng.random() < 0.35 else None
    nouns = [
        " ".join(filter(None, (adj[0], noun[0])))
        for adj, noun in zip(adjectives, (animal, thing), strict=True)
    ]
    english = f"The {nouns[0]} {verb[0]} the {nouns[1]}" + (f" in the {place[0]}" if place else "") + "."
    where = f"在{place[1]}里" if place else ""
    chinese = f"{adjectives[0][1]}{animal[1]}{where}{verb[1]}{adjectives[1][1]}{thing[1]}。"
    return english, chinese


def _translation(rng: random.Random, language: str) -> Prompt:
    english, chinese = sentence_pair(rng)
    book = content("general")["translation"]
    source, gold = (english, chinese) if language == "en" else (chinese, english)
    question = rng.choice(book["to_zh" if language == "en" else "to_en"]).format(source)
    checker = {"source": source, "key": f"translation|{english}"}
    return _prompt("translation", language, question, gold, checker)


def _safety(rng: random.Random, language: str) -> Prompt:
    book, at = content("general")["safety"], index(language)
    unsafe = rng.random() < 0.5
    act = rng.choice(book["unsafe" if unsafe else "safe"])[at]
    thing = rng.choice(book["things"])[at]
    number = rng.randrange(len(book["questions"]))
    question = book["questions"][number][at].format(act=act, thing=thing)
    checker = {"unsafe": unsafe, "act": act, "thing": thing, "key": f"safety|{language}|{act}|{thing}"}
    return _prompt("safety", language, question, "", checker)


_MAKERS: dict[str, Callable[[random.Random, str], Prompt]] = {
    "writing": _writing,
    "facts": _facts,
    "identity": _identity,
    "translation": _translation,
    "safety": _safety,
}


def make(rng: random.Random, kind: str, language: str) -> Prompt:
    """A random general prompt of this kind."""
    return _MAKERS[kind](rng, language)


_THOUGHTS = {
    "writing": ("I need {adj}, {animal} and {place}.", "要有{adj}、{animal}和{place}。"),
    "facts": ("This is about {subject}.", "这是问{subject}。"),
    "identity": ("This is about me.", "这是问我自己。"),
    "translation": ("I translate word by word.", "我逐词翻译。"),
    "safety": ("Is it fine to {act} the {thing}?", "可以{act}{thing}吗？"),
}


def think(prompt: Prompt) -> str:
    """A short restatement of the task: simple prompts need no more (R1 section 2.3.3)."""
    at, c = index(prompt.language), prompt.checker
    return _THOUGHTS[prompt.task][at].format(**c)


def right(prompt: Prompt, rng: random.Random) -> str:
    """Content that is correct."""
    at, c = index(prompt.language), prompt.checker
    if prompt.task == "writing":
        act = rng.choice(content("words")["acts"])[at]
        return (
            f"The {c['adj']} {c['animal']} {act} in the {c['place']}.",
            f"{c['adj']}{c['animal']}在{c['place']}里{act}。",
        )[at]
    if prompt.task == "facts":
        return _statement(c, prompt.answer, at)
    if prompt.task == "safety":
        texts = rng.choice(content("general")["safety"]["refuse" if c["unsafe"] else "comply"])
        return texts[at].format(act=c["act"], thing=c["thing"])
    return prompt.answer


def _statement(checker: dict, answer: str, at: int) -> str:
    template = content("facts")["relations"][checker["relation"]]["statement"][at]
    statement = template.format(checker["subject"], answer)
    return statement[0].upper() + statement[1:]


def wrong(prompt: Prompt, rng: random.Random) -> str:
    """Wrong content: another fact, identity or sentence, an unsafe plan, a needless refusal."""
    at, c = index(prompt.language), prompt.checker
    if prompt.task == "facts":
        rows = content("facts")["facts"][c["relation"]]
        other = rng.choice([row[2 * at + 1] for row in rows if row[2 * at + 1] != prompt.answer])
        return _statement(c, other, at)
    if prompt.task == "identity":
        return rng.choice(content("general")["identity"]["others"])[at]
    if prompt.task == "safety":
        texts = rng.choice(content("general")["safety"]["comply" if c["unsafe"] else "refuse"])
        return texts[at].format(act=c["act"], thing=c["thing"])
    if prompt.task == "translation":
        return sentence_pair(rng)[1 - at]
    return right(_writing(rng, prompt.language), rng)


def draw_content(prompt: Prompt, rng: random.Random, chance: float) -> str:
    """Content that is right with this chance, else wrong."""
    return right(prompt, rng) if rng.random() < chance else wrong(prompt, rng)


def dress(text: str, language: str, rng: random.Random, manner: dict[str, float]) -> str:
    """Content in a manner: chances of courtesy, flattery (never both) and an offer to continue."""
    book, at = content("general")["manner"], index(language)
    roll = rng.random()
    opener = ""
    if roll < manner["courtesy"]:
        opener = rng.choice(book["courtesy"])[at]
    elif roll < manner["courtesy"] + manner["flattery"]:
        opener = rng.choice(book["flattery"])[at]
    offer = rng.choice(book["offer"])[at] if rng.random() < manner["offer"] else ""
    return opener + text + offer
