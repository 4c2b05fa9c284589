"""Multi-step word problems: amounts change hands, grow, shrink and are shared, in English and Chinese.

Sample (level 1, en): "Tom has 12 apples. Tom buys 7 more. Tom gives away 5. How many apples does Tom have
now?"
careful: "First 12+7=19.\\nThen 19-5=14." -> "The answer is 14."
"""

import operator
import random
from dataclasses import dataclass

from r1pipe.core.types import Prompt
from r1pipe.data.world.content import content, index, make_prompt

STEPS = {1: (2, 3), 2: (4, 4), 3: (5, 6), 4: (7, 9)}  # equations of a careful solution, by level
LARGEST = 199  # no amount grows beyond this

_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}


@dataclass
class _Step:
    """One change of one amount."""

    who: int  # 0 or 1: whose amount; 2: the closing question's own sum or difference
    left: int
    operator: str
    right: int

    @property
    def result(self) -> int:
        return _OPERATIONS[self.operator](self.left, self.right)


# A sentence of a story before it is worded: (kind or operator, who, number, another number or wording).
_Sentence = tuple[str, int, int, int]
# Sentences, the steps of a careful solution, the kind of closing question, the key that decides the split.
_Story = tuple[list[_Sentence], list[_Step], str, str]

# kind -> [English, Chinese]; {p} person, {q} the other person, {n} and {k} numbers, {i} item, {m} its Chinese
# measure word, {b} container
_SENTENCES = {
    "start": [("{p} has {n} {i}.", "{p}有{n}{m}{i}。")],
    "groups": [("{p} has {n} {b} with {k} {i} each.", "{p}有{n}{b}{i}，每{b}{k}{m}。")],
    "gives": [("{p} gives {q} {n}.", "{p}给{q}{n}{m}。")],
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
_QUESTIONS = {
    "one": ("How many {i} does {p} have now?", "{p}现在有多少{m}{i}？"),
    "sum": ("How many {i} do they have together?", "他们一共有多少{m}{i}？"),
    "difference": ("How many more {i} does one have than the other?", "一个人比另一个人多多少{m}{i}？"),
}
_DISTRACTION = ("{p} also has {n} {i}.", "{p}还有{n}{m}{i}。")


def _change(rng: random.Random, who: int, amount: int) -> _Step:
    """A random change that keeps the amount a small whole number."""
    divisors = [k for k in (2, 3, 4, 5) if amount % k == 0 and amount > k]
    kinds = ["+", "+"] if amount <= LARGEST - 40 else []
    kinds += ["-", "-"] if amount > 4 else []
    kinds += ["*"] if 2 <= amount <= 45 else []
    kinds += ["/"] if divisors and amount > 12 else []
    kind = rng.choice(kinds)
    if kind == "+":
        right = rng.randint(2, 40)
    elif kind == "-":
        right = rng.randint(2, min(amount - 1, 60))
    elif kind == "*":
        right = rng.randint(2, min(4, LARGEST // amount))
    else:
        right = rng.choice(divisors)
    return _Step(who, amount, kind, right)


def make(rng: random.Random, language: str, level: int) -> Prompt:
    """A random problem of this level; `checker` holds the steps and the key that decides its split."""
    steps_wanted = rng.randint(*STEPS[level])
    two = steps_wanted >= 3 and rng.random() < 0.4
    sentences, steps, closing, key = _draw_story(rng, steps_wanted, two)
    distract = level >= 3 and rng.random() < 0.5
    words, at = content("words"), index(language)
    names = [pair[at] for pair in rng.sample(words["names"], 2)]
    item = rng.choice(words["items"])
    nouns = {"i": item[at], "m": item[2], "b": rng.choice(words["boxes"])[at]}
    story = []
    for kind, who, n, k in sentences:
        options = _SENTENCES[kind]
        template = options[k % len(options)][at]
        story.append(template.format(p=names[who], q=names[1 - who], n=n, k=k, **nouns))
    if distract:  # an amount that plays no part
        other = rng.choice(words["others"])
        n = rng.randint(2, 20)
        sentence = _DISTRACTION[at].format(p=names[0], n=n, i=other[at], m=other[2])
        story.insert(rng.randint(1, len(story)), sentence)
    story.append(_QUESTIONS[closing][at].format(p=names[0], **nouns))
    question = ("" if at else " ").join(story)
    checker = {
        "steps": [[s.who, s.left, s.operator, s.right, s.result] for s in steps],
        "names": names,
        "key": key,
    }
    return make_prompt("word", language, question, str(steps[-1].result), checker, level)


def _draw_story(rng: random.Random, count: int, two: bool) -> _Story:
    """A story of `count` steps about one person or two."""
    steps: list[_Step] = []
    if two:
        amounts = [rng.randint(5, 50), rng.randint(5, 50)]
        sentences = [("start", 0, amounts[0], 0), ("start", 1, amounts[1], 0)]
    elif rng.random() < 0.35:
        steps.append(_Step(0, rng.randint(2, 9), "*", rng.randint(2, 12)))
        amounts = [steps[0].result]
        sentences = [("groups", 0, steps[0].left, steps[0].right)]
    else:
        amounts = [rng.randint(5, 60)]
        sentences = [("start", 0, amounts[0], 0)]
    while len(steps) < count - two:  # the closing question on two people is a step of its own
        who = rng.randrange(2) if two else 0
        may_give = two and len(steps) < count - 2 and amounts[who] > 4 and amounts[1 - who] < 120
        if may_give and rng.random() < 0.35:
            n = rng.randint(2, min(amounts[who] - 1, 30))
            changes = [_Step(who, amounts[who], "-", n), _Step(1 - who, amounts[1 - who], "+", n)]
            sentences.append(("gives", who, n, 0))
        else:
            changes = [_change(rng, who, amounts[who])]
            sentences.append((changes[0].operator, who, changes[0].right, rng.randrange(3)))
        for step in changes:
            amounts[step.who] = step.result
        steps += changes
    if not two:
        return sentences, steps, "one", "word|" + ",".join(f"{s.left}{s.operator}{s.right}" for s in steps)
    closing = rng.choice(["sum", "difference"])
    if closing == "sum":
        steps.append(_Step(2, amounts[0], "+", amounts[1]))
    else:
        steps.append(_Step(2, max(amounts), "-", min(amounts)))
    key = "word2|" + ",".join(f"{s.who}{s.left}{s.operator}{s.right}" for s in steps)
    return sentences, steps, closing, key


def summary(language: str, answer: object) -> str:
    return (f"The answer is {answer}.", f"答案是{answer}。")[index(language)]


def solve(prompt: Prompt, strategy: str, rng: random.Random, slip: float) -> tuple[str, str]:
    """(reasoning, summary) in a strategy (thorough is careful here); `slip`: chance of a wrong equation."""
    steps = [_Step(*row[:4]) for row in prompt.checker["steps"]]
    at = index(prompt.language)
    if strategy == "guess":
        guess = steps[-1].result if rng.random() < 0.1 else max(1, steps[-1].result + rng.randint(-12, 12))
        return (f"I think it is {guess}.", f"我想是{guess}。")[at], summary(prompt.language, guess)
    lines: list[str] = []
    amounts: dict[tuple[int, int], int] = {}  # results as the solver believes them, slips included
    value = 0
    pending = ""
    for number, step in enumerate(steps):
        left, right = _carried(step, steps[:number], amounts)
        result = _Step(step.who, left, step.operator, right or 1).result
        joins_next = False  # whether a terse solver writes this equation and the next as one
        if strategy == "terse" and not pending and step.who != 2 and number + 1 < len(steps):
            following = steps[number + 1]
            joins_next = following.who == step.who and following.left == step.result
        if rng.random() < (slip * 5 if pending or joins_next else slip):
            result = max(0, result + rng.choice([-10, -2, -1, 1, 2, 10]))
        amounts[(step.who, number)] = value = result
        text = f"{pending or left}{step.operator}{right}"
        if joins_next:
            pending = text
            continue
        if step.who == 2:
            lead = ("Together ", "一共") if step.operator == "+" else ("Difference ", "相差")
        elif any(each.who == 1 for each in steps):
            name = prompt.checker["names"][step.who]
            lead = (f"{name} ", name)
        else:
            lead = ("Then ", "再") if lines else ("First ", "先")
        lines.append(f"{lead[at]}{text}={result}" + (".", "。")[at])
        pending = ""
    return "\n".join(lines), summary(prompt.language, value)


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


def is_right(prompt: Prompt, written: str) -> bool:
    return written == summary(prompt.language, prompt.answer)
