"""reasoning-gym's scorers: several evaluate what they are given, and none may run what a model wrote."""

import pytest

from r1pipe.core.errors import ConfigError
from r1pipe.core.types import Completion, Prompt, Score, Status
from r1pipe.data import gym_answers, reasoning_gym
from r1pipe.rewards import score_all, symbolic
from r1pipe.rewards.jailed import encode

factory = pytest.importorskip("reasoning_gym.factory")

MARK = "{mark}"  # stands for a file that an attack would make
ATTACKS = [
    f"__import__('os').system('touch {MARK}')",
    f"open('{MARK}', 'w')",
    f"[].__class__.__base__.__subclasses__()[0].__init__.__globals__['os'].system('touch {MARK}')",
    f"exec(\"import pathlib; pathlib.Path('{MARK}').touch()\")",
    f'1 + eval(\'open("{MARK}", "w").write("1")\')',
    f"Q if open('{MARK}', 'w') else Q",
    f'S(\'open("{MARK}", "w")\')',
    "9**9**9**9",
    "9* *9**9**9",
    "factorial(9999999)",
    "'A'*10**11",
    "[0]*10**11",
    "(" * 450 + "1" + ")" * 450,
    "-" * 900 + "1",
    "9*" * 499 + "9",
    "9" * 5000,
    "1+" * 50_000 + "1",
    "1/0",
    "1(2)",
    "",
    " ",
]


def entries(task, count):
    return [factory.create_dataset(task, size=count, seed=7)[index] for index in range(count)]


def verdicts(task, entry, answers):
    prompt = Prompt("gym-1", task, "en", "?", str(entry["answer"]), {"reasoning_gym": task, "entry": entry})
    texts = [f"<think>\nx\n</think>\n\n\\boxed{{{answer}}}" for answer in answers]
    completions = [Completion([1], [0.0], "stop", text) for text in texts]
    return [row["accuracy"] for row in score_all([prompt] * len(texts), completions, ["accuracy"])]


def test_what_evaluates_its_answers_is_found_through_helpers_too():
    found = {task for task, (scored, _) in factory.DATASETS.items() if gym_answers.evaluates(scored)}
    assert found >= {*gym_answers.GRAMMARS, "polynomial_multiplication", "simple_integration"}
    assert "bitwise_arithmetic" in found  # by a function of its module
    assert not found & {
        "chain_sum",
        "leg_counting",
        "basic_arithmetic",
        "propositional_logic",
        "gsm_symbolic",
    }
    assert len(found) < 20


class Indirect:
    def score_answer(self, answer, entry):
        return self._parsed(answer)

    @staticmethod
    def _parsed(answer):
        return Helper.parse(answer)


class Helper:
    @classmethod
    def parse(cls, text):
        from sympy import sympify

        return sympify(text)


class Harmless:
    def score_answer(self, answer, entry):
        return float(answer == entry["answer"])


def test_evaluation_is_found_behind_methods_classes_and_imports():
    assert gym_answers.evaluates(Indirect) and not gym_answers.evaluates(Harmless)


@pytest.mark.parametrize("task", ["polynomial_multiplication", "bitwise_arithmetic"])
def test_a_task_that_evaluates_and_has_no_grammar_is_refused(task):
    with pytest.raises(ConfigError, match=rf"the scorer of {task} evaluates.*these can be used: countdown"):
        reasoning_gym.load(task)
    [score] = verdicts(task, entries(task, 1)[0], ["x"])  # as from a file of another version
    assert score.status is Status.VERIFIER_FAILED and "ConfigError" in score.detail


@pytest.mark.parametrize("task", gym_answers.GRAMMARS)
def test_attacks_leave_nothing_behind_and_earn_nothing(task, tmp_path, monkeypatch):
    monkeypatch.setattr(symbolic, "ITEM_LIMIT_S", 30.0)  # a busy machine is no hanging item
    mark, entry = tmp_path / "mark", entries(task, 1)[0]
    found = verdicts(task, entry, [attack.replace(MARK, str(mark)) for attack in ATTACKS])
    assert [score.value for score in found] == [0.0] * len(ATTACKS)
    assert {score.status for score in found} <= {Status.SCORED, Status.VERIFIER_FAILED}
    assert not mark.exists() and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("task", gym_answers.GRAMMARS)
def test_right_answers_are_still_right_and_wrong_ones_wrong(task):
    for entry in entries(task, 12):
        right, wrong = verdicts(task, entry, [str(entry["answer"]), "7"])
        assert right == Score(1.0)
        assert wrong == Score(0.0, detail=wrong.detail)


def test_a_scorer_is_never_called_in_this_process(monkeypatch):
    def called(*arguments):
        raise AssertionError("a scorer was given a model's answer outside the worker")

    entry = entries("chain_sum", 1)[0]
    scored, _ = factory.DATASETS["chain_sum"]
    monkeypatch.setattr(scored, "score_answer", called)
    assert verdicts("chain_sum", entry, [entry["answer"]]) == [Score(1.0)]


def test_a_scorer_that_hangs_costs_its_item_alone(monkeypatch):
    entry = entries("coin_flip", 1)[0]
    monkeypatch.setattr(symbolic, "ITEM_LIMIT_S", 0.5)
    [hanging] = verdicts("coin_flip", entry, ["1e999999999"])  # a Fraction of it
    assert hanging.status is Status.VERIFIER_FAILED
    monkeypatch.setattr(symbolic, "ITEM_LIMIT_S", 600.0)
    assert verdicts("coin_flip", entry, [entry["answer"]]) == [Score(1.0)]


def test_entries_reach_the_scorer_with_their_tuples_and_numbers_as_keys():
    entry = entries("rearc", 1)[0]  # its scorer compares tuples
    assert verdicts("rearc", entry, [entry["answer"]]) == [Score(1.0)]
    assert encode({1: (2,)}) == {"dict": [[1, {"tuple": [2]}]]}
