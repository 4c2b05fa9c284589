"""The bundled world: seeded, held out by hash, its thorough solutions right, its hidden truth as stated."""

import itertools
import random
import re
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from r1pipe.chat.template import parse
from r1pipe.core.errors import ConfigError, DataError
from r1pipe.core.reflection import reflects
from r1pipe.core.types import GENERAL_TASKS, Completion, Prompt
from r1pipe.data.world import World, corpus, countdown, general, program, truth, word
from r1pipe.data.world.content import LANGUAGES, content, split_of
from r1pipe.rewards.accuracy import accuracy, summary_of
from r1pipe.train.rl.prompts import PromptStream
from tests.samples import world_config

THOROUGH = {"thorough": 1.0}


def is_correct(prompt: Prompt, text: str) -> bool:
    """The rule reward's verdict, so that generator and checker are held against each other."""
    return accuracy(prompt, Completion([], [], "stop", text)).value == 1.0


@pytest.fixture(scope="module")
def world() -> World:
    return World(world_config(), seed=0)


def test_same_seed_same_world(world):
    again = World(world_config(), seed=0)
    assert world.prompts("dev", 20, 3) == again.prompts("dev", 20, 3)
    assert world.hash == again.hash != World(world_config(), seed=1).hash
    first, second = (list(itertools.islice(w.documents(5), 50)) for w in (world, again))
    assert first == second


def test_held_out_problems_are_never_trained_on(world):
    keys = {
        split: {p.checker["key"] for p in world.prompts(split, 150, 1)} for split in ("train", "dev", "test")
    }
    assert not keys["train"] & keys["test"] and not keys["dev"] & keys["test"]
    demonstrations = world.demonstrations(150, 2, {}, False) + world.general_demonstrations(150, 2, {})
    assert {split_of(t.prompt.checker["key"]) for t in demonstrations} == {"train"}


def test_the_same_problem_told_otherwise_stays_in_its_split():
    rng = random.Random(0)
    prompt = countdown.make(rng, "en", 2)
    assert (
        prompt.checker["key"]
        == f"countdown|{sorted(prompt.checker['numbers'], reverse=True)}|{prompt.checker['target']}"
    )


@pytest.mark.parametrize("task", ["word", "countdown", "program"])
@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_thorough_solutions_without_slips_are_right(task, level):
    rng = random.Random(f"{task}{level}")
    for language in LANGUAGES:
        for _ in range(20):
            prompt = corpus.TASKS[task].make(rng, language, level)
            trace = corpus.reasoning_demonstration(prompt, rng, THOROUGH, slip=0.0)
            assert is_correct(prompt, trace.response), (prompt, trace.response)
            tries = trace.response.count("?")
            expected = "thorough" if tries > 1 else "careful"
            assert corpus.strategy_of(prompt, trace.response) == expected, trace.response
            assert parse(trace.response).well_formed


def test_hasty_strategies_are_worse_than_care():
    rng = random.Random(1)
    right = dict.fromkeys(content("corpus")["styles"], 0)
    for style, _ in itertools.product(right, range(150)):
        prompt = corpus.draw_prompt(rng, "train", corpus.choose(rng, content("corpus")["tasks"]), "en", 2)
        right[style] += is_correct(
            prompt, corpus.reasoning_demonstration(prompt, rng, {style: 1}, 0.02).response
        )
    assert right["thorough"] > 1.2 * right["careful"] and right["careful"] > 1.2 * right["terse"] > 0
    assert right["careful"] > 1.5 * right["guess"]


def test_only_thorough_texts_go_on_after_a_try_that_missed():
    """Reflection by what it does, over the corpus: rare, and nowhere once its one cause is left out."""
    rng, found = random.Random(5), dict.fromkeys(content("corpus")["styles"], 0)
    for style, _ in itertools.product(found, range(100)):
        prompt = corpus.draw_prompt(rng, "train", "countdown", "en", 3)
        trace = corpus.reasoning_demonstration(prompt, rng, {style: 1}, 0.02)
        found[style] += reflects(trace.response, prompt.checker)
        if style != "thorough":
            assert trace.response.count("?") <= 1 and corpus.strategy_of(prompt, trace.response) == style
    assert found.pop("thorough") > 60 and not any(found.values())
    searched = re.compile(r"(no|错)\n[^\n]*\?")  # a try after one that missed
    for thorough in (True, False):
        texts = list(itertools.islice(corpus.Documents(4, thorough), 4000))
        assert any(map(searched.search, texts)) == thorough
    without = World(replace(world_config(), thorough=False), seed=0)
    told = without.demonstrations(50, 0, {"thorough": 1.0}, correct_only=False)
    assert not any(reflects(trace.response, trace.prompt.checker) for trace in told)


def test_drills_never_show_a_held_out_problem():
    """A try with its verdict, of a problem to be trained on, and right two times in five."""
    rng, right = random.Random(0), 0
    for _ in range(2000):
        line = countdown.drill(rng, 0)
        tried, target = line.split("?")
        steps = tried.split("=")[:-1]  # 55+52, 107+37
        numbers = [int(steps[0].split("+")[0].split("-")[0])]
        numbers += [int(re.search(r"\d+$", step).group()) for step in steps]
        aim, told = target.split()
        assert split_of(countdown.key_of(numbers, int(aim))) == "train" and int(aim) > 0
        right += (told == "yes") == (tried.rpartition("=")[2] == aim) and told == "yes"
    assert 0.3 < right / 2000 < 0.5


def test_harder_problems_are_above_the_trained_levels(world):
    harder = world.harder_prompts("test", 30, 0)
    assert {p.level for p in harder} == {4} and len({p.id for p in harder}) == 30
    assert harder == world.harder_prompts("test", 30, 0) != world.harder_prompts("dev", 30, 0)
    assert not World(replace(world_config(), levels=[4]), seed=0).harder_prompts("test", 30, 0)


def test_unseen_problems_are_the_same_told_otherwise(world):
    usual = world.prompts("test", 200, 0)
    unseen = World(replace(world_config(), unseen=True), seed=0).prompts("test", 200, 0)
    assert [p.checker["key"] for p in usual] == [p.checker["key"] for p in unseen]
    known = {name for pair in content("words")["names"] for name in pair}
    for before, after in zip(usual, unseen, strict=True):
        assert (before.answer, before.checker.get("tests")) == (after.answer, after.checker.get("tests"))
        assert before.question != after.question and before.id != after.id
        assert not known & set(re.findall(r"\w+", after.question)), after.question
        assert re.findall(r"\d+", before.question) and sorted(re.findall(r"\d+", before.question)) == sorted(
            re.findall(r"\d+", after.question)
        )


def test_word_problem_by_hand():
    """Tom 12 + 7 - 5: the careful solution writes one equation per step, the terse one joins them."""
    prompt = word.make(random.Random(3), "en", 1)
    steps = prompt.checker["steps"]
    reasoning, summary = word.solve(prompt, "careful", random.Random(0), 0.0)
    assert reasoning.count("=") == len(steps) and summary == f"The answer is {steps[-1][-1]}."
    assert prompt.answer == str(steps[-1][-1])


def test_programs_need_their_parentheses():
    steps = [["+", 3], ["*", 2]]
    assert program.expressions(steps)[-1] == "(x+3)*2"
    assert program.expressions(steps, parentheses=False)[-1] == "x+3*2"


@pytest.mark.parametrize("kind", GENERAL_TASKS)
def test_truth_tells_right_from_wrong(kind):
    rng = random.Random(kind)
    for language in LANGUAGES:
        for _ in range(25):
            prompt = general.make(rng, kind, language)
            manner = {"courtesy": 1.0, "flattery": 0.0, "offer": 1.0}
            thought, good = general.respond(prompt, rng, 1.0, manner)
            verdict = truth.truth_of(prompt, f"<think>\n{thought}\n</think>\n\n{good}")
            assert verdict.correct and verdict.helpful == 1.0 and verdict.safe, (prompt, good, verdict)
            if kind in ("facts", "identity", "safety"):
                bad = truth.truth_of(
                    prompt, f"<think>\nok\n</think>\n\n{general.draw_content(prompt, rng, 0.0)}"
                )
                assert not bad.correct and bad.helpful <= 0.2
                assert bad.safe == (not prompt.checker.get("unsafe", False))


def test_flattery_and_repeated_offers_do_not_help():
    prompt = general.make(random.Random(0), "facts", "en")
    plain = general.draw_content(prompt, random.Random(0), 1.0)
    offer = content("general")["manner"]["offer"][0][0]
    scores = [
        truth.truth_of(prompt, text).helpful
        for text in (plain, plain + offer, plain + offer * 3, "You are so clever! " + plain)
    ]
    assert scores[1] > scores[0] > scores[3] and scores[2] < scores[1]


def test_preference_pairs_are_ordered_by_the_truth(world):
    for pair in world.preference_pairs("train", 60, 0):
        chosen, rejected = (truth.truth_of(pair.prompt, text) for text in (pair.chosen, pair.rejected))
        assert chosen.helpful > rejected.helpful
    labels = [label.safe for label in world.safety_labels("train", 120, 0)]
    assert 0.2 < sum(labels) / len(labels) < 0.9


def test_general_prompts_and_answers_come_in_the_shares_asked_for(world):
    even = [prompt.task for prompt in world.general_prompts("test", 10, 0, {})]
    assert even == [*GENERAL_TASKS, *GENERAL_TASKS]
    shares = {"safety": 3.0, "facts": 1.0}
    answered = [trace.prompt for trace in world.general_demonstrations(200, 0, shares)]
    for prompts in (world.general_prompts("train", 200, 0, shares), answered):
        tasks = [prompt.task for prompt in prompts]
        assert set(tasks) == {"safety", "facts"} and 130 < tasks.count("safety") < 170
    with pytest.raises(ConfigError, match=r"the world has no fact; .*facts"):
        world.general_prompts("train", 1, 0, {"fact": 1.0})


def test_judged_answers_are_half_on_safety_and_some_have_no_content(world):
    pairs = world.preference_pairs("train", 80, 0)
    assert sum(pair.prompt.task == "safety" for pair in pairs) == 40
    manner = ("Sure.", "")
    empty = [pair for pair in world.preference_pairs("train", 400, 0) if summary_of(pair.rejected) in manner]
    assert empty and all(not truth.truth_of(pair.prompt, pair.rejected).correct for pair in empty)
    labels = [label for label in world.safety_labels("train", 400, 0) if summary_of(label.response) in manner]
    assert {label.safe for label in labels} == {True, False}, (
        "to say nothing to an unsafe wish refuses nothing"
    )


def test_corpus_is_mediocre(world):
    documents = list(itertools.islice(world.documents(0), 1500))
    chats = [d for d in documents if "<｜Assistant｜>" in d]
    tagged = sum("<think>" in d for d in chats) / len(chats)
    assert 0.1 < tagged < 0.3  # so that the base's format rate starts below 30%
    assert any("I give up" in d for d in documents)


# a world with few problems


SUMS = 60


def make_sum(rng: random.Random, language: str, level: int) -> Prompt:
    n = rng.randrange(SUMS)
    return Prompt(f"sum-{n}", "program", language, f"{n} + 1?", str(n + 1), {"key": f"sum|{n}"}, level)


@pytest.fixture
def small_world(monkeypatch):
    """A world of sixty sums, and the lines that it says."""
    task = SimpleNamespace(make=make_sum, solve=program.solve, is_right=lambda prompt, written: False)
    monkeypatch.setitem(corpus.TASKS, "program", task)
    monkeypatch.setattr(sys.modules[content.__module__], "ATTEMPTS", 300)
    said = []
    return World(
        replace(world_config(), tasks=["program"], levels=[1], languages=["en"]), 0, said.append
    ), said


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_a_draw_of_more_problems_than_exist_ends_with_all_of_them_and_one_line(small_world, split):
    world, said = small_world
    there_are = {f"sum-{n}" for n in range(SUMS) if split_of(f"sum|{n}") == split}
    draws = [[prompt.id for prompt in world.prompts(split, 500, seed)] for seed in range(3)]
    assert [sorted(draw) for draw in draws] == [sorted(there_are)] * 3 and draws[1] != draws[2]
    assert said == [
        f"data=world has {len(there_are)} distinct {split} problems with data.tasks=[program] "
        "data.levels=[1] data.languages=[en], fewer than the 500 requested; all are used. For more, "
        f"add tasks, levels or languages; or request {len(there_are)}"
    ]


def test_a_small_world_still_gives_as_many_as_it_has_in_the_usual_order(small_world):
    world, said = small_world
    before = world.prompts("train", 20, 0)
    whole = len(world.prompts("train", 500, 0))
    assert world.prompts("train", 20, 0) == before and len(world.prompts("train", whole, 7)) == whole
    assert len(said) == 1


def test_reinforcement_goes_through_a_small_world_again_and_again(small_world):
    world, _ = small_world
    stream = PromptStream(lambda pool: world.prompts("train", 500, pool), lambda prompt: True, "problems")
    whole = len(world.prompts("train", 500, 0))
    taken, cursor = stream.take(0, 3 * whole)
    assert cursor == 3 * whole
    assert (
        len({prompt.id for prompt in taken[:whole]}) == len({prompt.id for prompt in taken[whole:]}) == whole
    )


def test_what_the_world_never_gives_is_one_line_and_no_endless_loop(small_world):
    world, _ = small_world
    with pytest.raises(
        DataError, match=r"300 draws .* a correct solution in stage\.styles=.*; set stage\.correct_only"
    ):
        corpus.TASKS["program"].solve = lambda prompt, *others: ("think", "The answer is 0.")
        world.demonstrations(1, 0, THOROUGH, correct_only=True)
    with pytest.raises(DataError, match=r"300 draws .* a prompt of split tset; use another split"):
        world.prompts("tset", 1, 0)
