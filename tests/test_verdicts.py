"""Accuracy in the background: in order, while others are drawn, and with every error told."""

import threading
from collections.abc import Callable
from queue import LifoQueue

import pytest
from rl_runs import go
from shapes import ours, tiny
from tiny_runs import tiny_run

from r1pipe import rewards
from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.types import Completion, Prompt, Score, Status
from r1pipe.rewards import Verdicts, score_all, symbolic
from r1pipe.train.rollout import SamplingParams
from r1pipe.train.rollout.batching import Batcher

PROMPTS = [Prompt(f"word-{i}", "word", "en", "?", str(i)) for i in range(4)]
LONG_S = 300.0  # only what never happens takes as long
ROOT = [Prompt(f"word-{i}", "word", "en", "?", r"\sqrt{2}") for i in range(4)]


class Numbers:
    """A chat format in which a completion's first token is the answer that its text states."""

    def response(self, tokens: list[int]) -> str:
        return f"<think>\nx\n</think>\n\nThe answer is {tokens[0]}."


def drawn(place: int) -> Completion:
    return Completion([place], [0.0], "stop")


def answered(text: str) -> Completion:
    return Completion([1], [0.0], "stop", f"<think>\nx\n</think>\n\n{text}")


def put(monkeypatch: pytest.MonkeyPatch, check: Callable[[Prompt, Completion], Score]) -> None:
    monkeypatch.setattr(rewards, "accuracy_reward", check)


def test_the_sampler_tells_each_completion_once_with_its_prompts_place():
    model = ours(tiny(num_hidden_layers=2, vocab_size=24, initializer_range=0.08))
    told: list[tuple[int, Completion]] = []
    counts: list[int] = []
    params = SamplingParams(max_tokens=16, n=3, seed=5)
    completions = Batcher(model, 1, 0, max_num_seqs=9).generate(
        [[5, 6], [7], [8, 9]],
        params,
        lambda done, _: counts.append(len(told) - done),
        lambda *c: told.append(c),
    )
    assert set(counts) == {0}, "all that have ended are told before the next is drawn"
    assert [place for place, _ in told] != sorted(place for place, _ in told), "they end out of order"
    places = {id(completion): place for place, completion in told}
    assert [places[id(completion)] for completion in completions] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_verdicts_keep_their_order_whatever_ends_first(monkeypatch):
    ends = [threading.Event() for _ in PROMPTS]

    def last_first(prompt: Prompt, completion: Completion) -> Score:
        place = int(prompt.answer)
        if place == 0:
            assert ends[1].wait(LONG_S), "the second waits for no one"
        ends[place].set()
        return Score(float(place), detail=completion.text)

    put(monkeypatch, last_first)
    completions = [drawn(place) for place in range(4)]
    with Verdicts() as found:
        tell = found.on_completion(Numbers(), PROMPTS)
        for place in (2, 0, 3, 1):
            tell(place, completions[place])
        scores = score_all(PROMPTS, completions, ["accuracy", "format"], found)
    assert [row["accuracy"].value for row in scores] == [0, 1, 2, 3]
    assert [row["accuracy"].detail for row in scores] == [completion.text for completion in completions]
    assert [row["format"].value for row in scores] == [1] * 4


def test_what_was_begun_early_says_what_is_said_late():
    texts = [r"\boxed{2^{1/2}}", r"\boxed{2}", "I give up.", r"\boxed{\frac{2}{\sqrt{2}}}"]
    completions = [answered(text) for text in texts]
    with Verdicts() as found:
        for prompt, completion in zip(ROOT[::-1], completions[::-1], strict=True):
            found.submit(prompt, completion)
        early = score_all(ROOT, completions, ["accuracy", "language"], found)
    assert early == score_all(ROOT, completions, ["accuracy", "language"])
    assert [row["accuracy"].value for row in early] == [1, 0, 0, 1]


def test_what_has_ended_is_checked_while_others_are_drawn(monkeypatch):
    checked = [threading.Event() for _ in PROMPTS]

    def check(prompt: Prompt, completion: Completion) -> Score:
        assert not checked[int(prompt.answer)].is_set(), "checked once"
        checked[int(prompt.answer)].set()
        return Score(1.0)

    put(monkeypatch, check)
    completions = [drawn(place) for place in range(4)]
    with Verdicts() as found:
        tell = found.on_completion(Numbers(), PROMPTS)
        for place, completion in enumerate(completions):
            tell(place, completion)
            assert checked[place].wait(LONG_S), "without anybody asking for it"
        scores = score_all(PROMPTS, completions, ["accuracy"], found)
    assert [row["accuracy"].value for row in scores] == [1] * 4


def test_an_item_that_hangs_is_marked_and_holds_up_no_other(monkeypatch):
    monkeypatch.setattr(symbolic, "ITEM_CPU_LIMIT_S", 60.0)
    workers = [symbolic.Worker() for _ in range(symbolic.WORKERS)]
    idle: LifoQueue[symbolic.Worker] = LifoQueue()
    for worker in workers:
        worker.ask({"gold": "1", "answer": "1"})  # started, so that none is killed while it starts
        idle.put(worker)
    monkeypatch.setattr(symbolic, "_idle", idle)
    completions = [answered(text) for text in (r"\boxed{\prod_{k=1}^{10^{6}} k}", *[r"\boxed{2^{1/2}}"] * 3)]
    with Verdicts() as found:
        begun = [found.submit(*pair) for pair in zip(ROOT, completions, strict=True)]
        assert [future.result() for future in begun[1:]] == [Score(1.0)] * 3
        assert not begun[0].done(), "the others have not waited for it"
        [hanging] = {*workers} - {*idle.queue}
        hanging.child.process.kill()
        [first, *_] = score_all(ROOT, completions, ["accuracy"], found)
    assert first["accuracy"].status is Status.VERIFIER_FAILED
    for worker in workers:
        worker.close()


@pytest.mark.parametrize("error", [EnvironmentProblem("no isolation"), ZeroDivisionError("a bug")])
def test_an_error_in_the_background_reaches_who_asks(monkeypatch, error):
    def broken(prompt: Prompt, completion: Completion) -> Score:
        if prompt.answer == "2":
            raise error
        return Score(1.0)

    put(monkeypatch, broken)
    completions = [drawn(place) for place in range(4)]
    with pytest.raises(type(error), match=str(error)), Verdicts() as found:
        tell = found.on_completion(Numbers(), PROMPTS)
        for place, completion in enumerate(completions):
            tell(place, completion)
        score_all(PROMPTS, completions, ["accuracy"], found)


def test_nobody_waits_for_checks_when_the_sampler_fails(monkeypatch):
    begun: list[str] = []
    freed: list[bool] = []
    free = threading.Event()

    def stuck(prompt: Prompt, completion: Completion) -> Score:
        begun.append(prompt.answer)
        freed.append(free.wait(LONG_S))
        return Score(1.0)

    put(monkeypatch, stuck)
    many = [Prompt(f"word-{i}", "word", "en", "?", str(i)) for i in range(20)]
    with pytest.raises(ArithmeticError), Verdicts() as found:
        for place, prompt in enumerate(many):
            found.submit(prompt, drawn(place))
        raise ArithmeticError
    free.set()
    for thread in found._threads._threads:
        thread.join()
    assert len(begun) <= symbolic.WORKERS and all(freed), "the block was left before they were free"


def test_checks_in_the_background_leave_sampling_as_it_is():
    """The same bits with and without threads at work beside it."""
    model = ours(tiny(num_hidden_layers=2, vocab_size=24, initializer_range=0.08))
    asked, params = [[5, 6], [7], [8, 9], [3]], SamplingParams(max_tokens=16, n=4, seed=5)
    alone = Batcher(model, 1, 0, max_num_seqs=4).generate(asked, params)
    with Verdicts() as found:
        judged = Batcher(model, 1, 0, max_num_seqs=4).generate(
            asked, params, None, found.on_completion(Numbers(), ROOT)
        )
        score_all([prompt for prompt in ROOT for _ in range(4)], judged, ["accuracy"], found)
    assert [(c.tokens, c.logprobs) for c in judged] == [(c.tokens, c.logprobs) for c in alone]


def test_an_error_in_the_background_ends_the_loop_in_one_line(tmp_path, monkeypatch):
    def broken(prompt: Prompt, completion: Completion) -> Score:
        raise EnvironmentProblem("no isolation for generated programs")

    put(monkeypatch, broken)
    folder = tiny_run(tmp_path / "run", "stage=grpo", "stage.sampling.max_tokens=8", "stage.kl_coef=0")
    with pytest.raises(SystemExit) as ended:
        go(folder)
    assert ended.value.code == 2
    assert (folder / "error.txt").read_text() == "no isolation for generated programs\n"
