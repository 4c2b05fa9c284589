"""Multi-step word problems: amounts change hands, grow, shrink and are shared, in English and Chinese.

Sample (level 1, en): "Tom has 12 apples. Tom buys 7 more. Tom gives away 5. How many apples does Tom have
now?"
careful: "First 12+7=19.\\nThen 19-5=14." -> "The answer is 14."
"""

import random
from dataclasses import dataclass

from r1pipe.core.types import Prompt
from r1pipe.data.world.content import content, index, prompt_id

STEPS = {1: (2, 3), 2: (4, 4), 3: (5, 6), 4: (7, 9)}  # equations of a careful solution, by level
LARGEST = 199  # no amount grows beyond this


@dataclass
class _Step:
    """One change of one amount."""

    who: int  # 0 or 1: whose amount; 2: the closing question's own sum or difference
    left: int
    operator: str
    right: int

    @property
    def result(self) -> int:
        return {
            "+": self.left + self.right,
            "-": self.left - self.right,
            "*": self.left * self.right,
            "/": self.left // self.right,
        }[self.operator]


# A sentence of a story before it is worded: (kind or operator, who, number, another number or wording).
_Sentence = tuple[str, int, int, int]
# Sentences, the steps of a careful solution, the kind of closing question, the key that decides the split.
_Story = tuple[list[_Sentence], list[_Step], str, str]

_SENTENCES = {  # operator -> [English, Chinese]; {p} person, {n} number, {m} measure word
    "+": [
        ("{p} buys {n} more.", "{p}又买了{n}{m}。"),
        ("{p} finds {n} more.", "{p}又找到{n}{m}。"),
        ("{p} gets {n} as a gift.", "{p}收到{n}{m}礼物。"),
    ],
    "-": [
        ("{p} gives away {n}.", "{p}送走了{n}{m}。"),
        ("{p} loses {n}.", "{p}丢了{n}{m}。"),
        ("{p} sells {n}.", "{p}卖了{n}{m}。"),
    ],
    "*": [("Then {p} has {n} times as many.", "然后{p}的变成{n}倍。")],
    "/": [("{p} splits them into {n} equal parts and keeps one.", "{p}平均分成{n}份，只留一份。")],
}


def _change(rng: random.Random, who: int, amount: int) -> _Step:
    """A random change that keeps the amount a small whole number."""
    divisors = [k for k in (2, 3, 4, 5) if amount % k == 0 and amount > k]
    kinds = ["+", "+"] if amount <= LARGEST - 40 else []
    kinds += ["-", "-"] if amount > 4 else []
    kinds += ["*"] if 2 <= amount <= 45 else []
    kinds += ["/"] if divisors and amount > 12 else []
    operator = rng.choice(kinds)
    if operator == "+":
        right = rng.randint(2, 40)
    elif operator == "-":
        right = rng.randint(2, min(amount - 1, 60))
    elif operator == "*":
        right = rng.randint(2, min(4, LARGEST // amount))
    else:
        right = rng.choice(divisors)
    return _Step(who, amount, operator, right)


def make(rng: random.Random, language: str, level: int) -> Prompt:
    """A random problem of this level; `checker` holds the steps and the key that decides its split."""
    steps_wanted = rng.randint(*STEPS[level])
    two = steps_wanted >= 3 and rng.random() < 0.4
    story = _two_people(rng, steps_wanted) if two else _one_person(rng, steps_wanted)
    sentences, steps, closing, key = story
    question, names = _tell(rng, language, sentences, closing, distract=level >= 3 and rng.random() < 0.5)
    checker = {
        "steps": [[s.who, s.left, s.operator, s.right, s.result] for s in steps],
        "names": names,
        "key": key,
    }
    return Prompt(
        prompt_id("word", language, question),
        "word",
        language,
        question,
        str(steps[-1].result),
        checker,
        level,
    )


def _one_person(rng: random.Random, count: int) -> _Story:
    steps: list[_Step] = []
    if rng.random() < 0.35:
        steps.append(_Step(0, rng.randint(2, 9), "*", rng.randint(2, 12)))
        sentences = [("groups", 0, steps[0].left, steps[0].right)]
        amount = steps[0].result
    else:
        amount = rng.randint(5, 60)
        sentences = [("start", 0, amount, 0)]
    while len(steps) < count:
        step = _change(rng, 0, amount)
        amount = step.result
        steps.append(step)
        sentences.append((step.operator, 0, step.right, rng.randrange(3)))
    return sentences, steps, "one", "word|" + ",".join(f"{s.left}{s.operator}{s.right}" for s in steps)


def _two_people(rng: random.Random, count: int) -> _Story:
    amounts = [rng.randint(5, 50), rng.randint(5, 50)]
    sentences = [("start", 0, amounts[0], 0), ("start", 1, amounts[1], 0)]
    steps: list[_Step] = []
    while len(steps) < count - 1:
        who = rng.randrange(2)
        if len(steps) < count - 2 and amounts[who] > 4 and amounts[1 - who] < 120 and rng.random() < 0.35:
            n = rng.randint(2, min(amounts[who] - 1, 30))
            pair = [_Step(who, amounts[who], "-", n), _Step(1 - who, amounts[1 - who], "+", n)]
            sentences.append(("gives", who, n, 0))
        else:
            pair = [_change(rng, who, amounts[who])]
            sentences.append((pair[0].operator, who, pair[0].right, rng.randrange(3)))
        for step in pair:
            amounts[step.who] = step.result
        steps += pair
    more = int(amounts[1] > amounts[0])
    closing = rng.choice(["sum", "difference"])
    if closing == "sum":
        steps.append(_Step(2, amounts[0], "+", amounts[1]))
    else:
        steps.append(_Step(2, amounts[more], "-", amounts[1 - more]))
    return (
        sentences,
        steps,
        closing,
        "word2|" + ",".join(f"{s.who}{s.left}{s.operator}{s.right}" for s in steps),
    )


def _tell(
    rng: random.Random, language: str, sentences: list[_Sentence], closing: str, distract: bool
) -> tuple[str, list[str]]:
    """The story in words; returns the question and the two names."""
    words, at = content("words"), index(language)
    names = [pair[at] for pair in rng.sample(words["names"], 2)]
    item, measure = (lambda row: (row[at], row[2]))(rng.choice(words["items"]))
    box = rng.choice(words["boxes"])
    told = []
    for kind, who, n, extra in sentences:
        if kind == "start":
            told.append((f"{names[who]} has {n} {item}.", f"{names[who]}有{n}{measure}{item}。")[at])
        elif kind == "groups":
            told.append(
                (
                    f"{names[who]} has {n} {box[0]} with {extra} {item} each.",
                    f"{names[who]}有{n}{box[1]}{item}，每{box[1]}{extra}{measure}。",
                )[at]
            )
        elif kind == "gives":
            told.append(
                (
                    f"{names[who]} gives {names[1 - who]} {n}.",
                    f"{names[who]}给{names[1 - who]}{n}{measure}。",
                )[at]
            )
        else:
            options = _SENTENCES[kind]
            told.append(options[extra % len(options)][at].format(p=names[who], n=n, m=measure))
    if distract:  # an amount that plays no part
        row = rng.choice(words["others"])
        n = rng.randint(2, 20)
        told.insert(
            rng.randint(1, len(told)),
            (f"{names[0]} also has {n} {row[0]}.", f"{names[0]}还有{n}{row[2]}{row[1]}。")[at],
        )
    told.append(
        {
            "one": (f"How many {item} does {names[0]} have now?", f"{names[0]}现在有多少{measure}{item}？"),
            "sum": (f"How many {item} do they have together?", f"他们一共有多少{measure}{item}？"),
            "difference": (
                f"How many more {item} does one have than the other?",
                f"一个人比另一个人多多少{measure}{item}？",
            ),
        }[closing][at]
    )
    return ("" if at else " ").join(told), names


def summary(language: str, answer: object) -> str:
    return (f"The answer is {answer}.", f"答案是{answer}。")[index(language)]


def solve(prompt: Prompt, strategy: str, rng: random.Random, slip: float) -> tuple[str, str]:
    """(reasoning, summary) in a strategy (careful, terse, guess); `slip`: chance of an error per equation."""
    steps = [_Step(*row[:4]) for row in prompt.checker["steps"]]
    at = index(prompt.language)
    if strategy == "guess":
        guess = steps[-1].result if rng.random() < 0.1 else max(1, steps[-1].result + rng.randint(-12, 12))
        return (f"I think it is {guess}.", f"我想是{guess}。")[at], summary(prompt.language, guess)
    two_equations = strategy == "terse"
    lines: list[str] = []
    amounts: dict[tuple[int, int], int] = {}  # what a slip did to later amounts
    value = 0
    pending = ""
    for number, step in enumerate(steps):
        left, right = _carried(step, steps[:number], amounts)
        result = _Step(step.who, left, step.operator, right or 1).result
        joins_next = (
            two_equations and not pending and number + 1 < len(steps) and _chains(step, steps[number + 1])
        )
        if rng.random() < (slip * 5 if pending or joins_next else slip):
            result = max(0, result + rng.choice([-10, -2, -1, 1, 2, 10]))
        amounts[(step.who, number)] = value = result
        text = f"{pending or left}{step.operator}{right}"
        if joins_next:
            pending = text
            continue
        lines.append(_line(prompt, step, len(lines), f"{text}={result}"))
        pending = ""
    return "\n".join(lines), summary(prompt.language, value)


def _chains(step: _Step, following: _Step) -> bool:
    """Whether the next equation goes on from this one's result, so that a hasty solver writes both as one."""
    return following.who == step.who and following.left == step.result and step.who != 2


def _carried(step: _Step, before: list[_Step], amounts: dict[tuple[int, int], int]) -> tuple[int, int]:
    """The step's operands as the solver believes them, earlier slips included."""
    latest = {s.who: amounts[(s.who, n)] for n, s in enumerate(before)}
    if step.who != 2:
        return latest.get(step.who, step.left), step.right
    ends = {s.who: s.result for s in before}
    if step.operator == "+":
        first = 0
    else:  # the larger amount comes first; a person without steps still has the amount of the story
        first = next((w for w, amount in ends.items() if amount == step.left), 1 - next(iter(ends), 1))
    return latest.get(first, step.left), latest.get(1 - first, step.right)


def _line(prompt: Prompt, step: _Step, number: int, equation: str) -> str:
    en = index(prompt.language) == 0
    if step.who == 2:
        lead = ("Together ", "一共") if step.operator == "+" else ("Difference ", "相差")
        return f"{lead[0]}{equation}." if en else f"{lead[1]}{equation}。"
    if any(row[0] == 1 for row in prompt.checker["steps"]):
        name = prompt.checker["names"][step.who]
        return f"{name} {equation}." if en else f"{name}{equation}。"
    lead = ("First ", "先") if number == 0 else ("Then ", "再")
    return f"{lead[0]}{equation}." if en else f"{lead[1]}{equation}。"


def is_right(prompt: Prompt, written: str) -> bool:
    """Whether a summary that `solve` wrote is correct."""
    return written == summary(prompt.language, prompt.answer)
