"""reasoning-gym's scorers: several evaluate what they are given, and none may run what a model wrote."""

import ast
import importlib.metadata
import inspect
import textwrap
from types import FunctionType, ModuleType
from typing import Any

import pytest

from r1pipe.core.errors import ConfigError, EnvironmentProblem
from r1pipe.core.types import Completion, Prompt, Score, Status
from r1pipe.rewards import gym, score_all, symbolic
from r1pipe.rewards.programs.jailed import encode

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


EVALUATING = {"eval", "exec", "compile", "__import__"}
EVALUATING_PACKAGES = {"builtins", "importlib", "os", "pickle", "subprocess", "sympy"}


def evaluates(scored: type) -> bool:
    """Whether `score_answer` of a class can reach `eval` or sympy through the code of its package."""
    package = _package(scored)
    reached: list[tuple[Any, Any]] = [(getattr(scored, "score_answer"), scored)]  # noqa: B009 - of any class
    seen = set()
    while reached:
        function, owner = reached.pop()
        if function in seen:
            continue
        seen.add(function)
        names, attributes, imported = _written(function)
        known = function.__globals__
        objects = [known[name] for name in names if name in known]
        packages = imported | {_package(each) for each in objects}
        if names & EVALUATING or packages & EVALUATING_PACKAGES:
            return True
        holders = [each for each in (owner, *objects) if _package(each) == package]
        objects += [getattr(holder, name, None) for holder in holders for name in attributes]
        for each in objects:
            parts = vars(each).values() if isinstance(each, type) else [each]
            functions = (inspect.unwrap(getattr(part, "__func__", part)) for part in parts)
            of = each if isinstance(each, type) else owner
            reached += [(one, of) for one in functions if _package(one) == package and _has_source(one)]
    return False


def _package(thing: Any) -> str:
    name = thing.__name__ if isinstance(thing, ModuleType) else getattr(thing, "__module__", None)
    return str(name).partition(".")[0]


def _has_source(function: Any) -> bool:
    """Not so what `dataclass` generates."""
    return isinstance(function, FunctionType) and not function.__code__.co_filename.startswith("<")


def _written(function: FunctionType) -> tuple[set[str], set[str], set[str]]:
    """The names in a function's source, the attributes, and the packages that it imports itself."""
    names, attributes, imported = set(), set(), set()
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        match node:
            case ast.Name(id=name):
                names.add(name)
            case ast.Attribute(attr=name):
                attributes.add(name)
            case ast.ImportFrom(module=str(module)):
                imported.add(module.partition(".")[0])
            case ast.Import(names=modules):
                imported |= {module.name.partition(".")[0] for module in modules}
    return names, attributes, imported


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
    assert evaluates(Indirect) and not evaluates(Harmless)


def test_the_tables_name_every_scorer_that_evaluates_answers():
    evaluating = {task for task, (scored, _) in factory.DATASETS.items() if evaluates(scored)}
    assert evaluating == gym.REFUSED | {*gym.GRAMMARS}
    assert importlib.metadata.version("reasoning-gym") == gym.VERSION


def test_another_version_is_refused_with_the_remedy(monkeypatch):
    gym.dataset.cache_clear()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "99.0")
    with pytest.raises(
        EnvironmentProblem, match=f"reasoning-gym 99.0 .*pip install reasoning-gym=={gym.VERSION}"
    ):
        gym.dataset("chain_sum")


@pytest.mark.parametrize("task", sorted(gym.REFUSED))
def test_a_task_that_evaluates_and_has_no_grammar_is_refused(task):
    with pytest.raises(ConfigError, match=rf"the scorer of {task} evaluates.*can be used: countdown"):
        gym.dataset(task)
    [score] = verdicts(task, entries(task, 1)[0], ["x"])  # as from a file of another version
    assert score.status is Status.VERIFIER_FAILED and "ConfigError" in score.detail


@pytest.mark.parametrize("task", gym.GRAMMARS)
def test_attacks_leave_nothing_behind_and_earn_nothing(task, tmp_path):
    mark, entry = tmp_path / "mark", entries(task, 1)[0]
    found = verdicts(task, entry, [attack.replace(MARK, str(mark)) for attack in ATTACKS])
    assert [score.value for score in found] == [0.0] * len(ATTACKS)
    assert {score.status for score in found} <= {Status.SCORED, Status.VERIFIER_FAILED}
    assert not mark.exists() and not [*tmp_path.iterdir()]


@pytest.mark.parametrize("task", gym.GRAMMARS)
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
    monkeypatch.setattr(symbolic, "ITEM_CPU_LIMIT_S", 2.5)
    entry = entries("coin_flip", 1)[0]
    hanging, right = verdicts("coin_flip", entry, ["1e999999999", entry["answer"]])  # a Fraction of it
    assert hanging.status is Status.VERIFIER_FAILED and right == Score(1.0)


def test_entries_reach_the_scorer_with_their_tuples_and_numbers_as_keys():
    entry = entries("rearc", 1)[0]  # its scorer compares tuples
    assert verdicts("rearc", entry, [entry["answer"]]) == [Score(1.0)]
    assert encode({1: (2,)}) == {"dict": [[1, {"tuple": [2]}]]}
