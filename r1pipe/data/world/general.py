"""General prompts (writing, facts, identity, translation, safety) with right and wrong answers to them.

An answer has *content* and a *manner* (courtesy, an offer to continue, flattery). The hidden truth in
truth.py scores both; reward models only ever see texts.
"""

import random

from r1pipe.core.types import Prompt
from r1pipe.data.world.content import content, index, make_prompt


def make(rng: random.Random, kind: str, language: str) -> Prompt:
    """A random general prompt of this kind."""
    words, at = content("words"), index(language)
    book, answer = content("general"), ""
    checker: dict
    if kind == "writing":
        adj, animal, place = (rng.choice(words[name])[at] for name in ("adjectives", "animals", "places"))
        checker = {"adj": adj, "animal": animal, "place": place}
        questions = book["writing"]["questions"]
        question = questions[rng.randrange(len(questions))][at].format(**checker)
        key = f"{language}|{adj}|{animal}|{place}"
    elif kind == "facts":
        book = content("facts")
        relation = rng.choice(list(book["facts"]))
        row = rng.choice(book["facts"][relation])
        subject, answer = row[2 * at], row[2 * at + 1]
        number = rng.randrange(len(book["relations"][relation]["questions"]))
        question = book["relations"][relation]["questions"][number][at].format(subject)
        question = question[0].upper() + question[1:]
        checker = {"relation": relation, "subject": subject}
        key = f"{language}|{relation}|{row[0]}|{number}"
    elif kind == "identity":
        about, *texts = rng.choice(book["identity"]["questions"])
        question = rng.choice(book["identity"]["openers"])[at] + texts[at]
        answer = book["identity"]["answers"][about][at]
        checker, key = {"about": about}, f"{language}|{question}"
    elif kind == "translation":
        pair = sentence_pair(rng)
        source, answer = pair[at], pair[1 - at]
        question = rng.choice(book["translation"][("to_zh", "to_en")[at]]).format(source)
        checker, key = {"source": source}, pair[0]
    else:
        book = book["safety"]
        unsafe = rng.random() < 0.5
        act = rng.choice(book["unsafe" if unsafe else "safe"])[at]
        thing = rng.choice(book["things"])[at]
        question = rng.choice(book["questions"])[at].format(act=act, thing=thing)
        checker = {"unsafe": unsafe, "act": act, "thing": thing}
        key = f"{language}|{act}|{thing}"
    return make_prompt(kind, language, question, answer, checker | {"key": f"{kind}|{key}"})


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


THOUGHTS = {
    "writing": ("I need {adj}, {animal} and {place}.", "要有{adj}、{animal}和{place}。"),
    "facts": ("This is about {subject}.", "这是问{subject}。"),
    "identity": ("This is about me.", "这是问我自己。"),
    "translation": ("I translate word by word.", "我逐词翻译。"),
    "safety": ("Is it fine to {act} the {thing}?", "可以{act}{thing}吗？"),
}


def state_fact(relation: str, subject: str, answer: str, at: int) -> str:
    statement = content("facts")["relations"][relation]["statement"][at].format(subject, answer)
    return statement[0].upper() + statement[1:]


def draw_content(prompt: Prompt, rng: random.Random, chance: float) -> str:
    """Content that is right with this chance, else wrong: another fact, identity or sentence, an unsafe plan,
    a needless refusal."""
    right = rng.random() < chance
    at, c = index(prompt.language), prompt.checker
    if prompt.task == "writing":
        if not right:
            c = make(rng, "writing", prompt.language).checker
        act = rng.choice(content("words")["acts"])[at]
        return (
            f"The {c['adj']} {c['animal']} {act} in the {c['place']}.",
            f"{c['adj']}{c['animal']}在{c['place']}里{act}。",
        )[at]
    if prompt.task == "safety":
        texts = content("general")["safety"]["refuse" if c["unsafe"] == right else "comply"]
        return rng.choice(texts)[at].format(act=c["act"], thing=c["thing"])
    answer = prompt.answer
    if prompt.task == "facts":
        if not right:
            answers = [row[2 * at + 1] for row in content("facts")["facts"][c["relation"]]]
            answer = rng.choice([other for other in answers if other != prompt.answer])
        return state_fact(c["relation"], c["subject"], answer, at)
    if right:
        return answer
    if prompt.task == "identity":
        return rng.choice(content("general")["identity"]["others"])[at]
    return sentence_pair(rng)[1 - at]


def respond(
    prompt: Prompt, rng: random.Random, right: float, manner: dict[str, float], empty: bool = False
) -> tuple[str, str]:
    """(reasoning, answer): content that is right with this chance, or none, in a manner.

    The reasoning restates the task: simple prompts need no more (R1 section 2.3.3). `manner`: the chances of
    courtesy, flattery (never both) and an offer to continue.
    """
    book, at = content("general")["manner"], index(prompt.language)
    body = "" if empty else draw_content(prompt, rng, right)
    roll = rng.random()
    opener = ""
    if roll < manner["courtesy"]:
        opener = rng.choice(book["courtesy"])[at]
    elif roll < manner["courtesy"] + manner["flattery"]:
        opener = rng.choice(book["flattery"])[at]
    offer = rng.choice(book["offer"])[at] if rng.random() < manner["offer"] else ""
    return THOUGHTS[prompt.task][at].format(**prompt.checker), opener + body + offer
