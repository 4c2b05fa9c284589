"""The losses of distillation: by hand, against slow references and TRL's, gradients by finite differences."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import tiny_config
from torch import Tensor

from r1pipe.model import logprobs
from r1pipe.model.logprobs import Head
from r1pipe.train.distill import losses

KINDS = ("forward_kl", "reverse_kl", "jensen_shannon")
TEACHER = "teacher=/no/checkpoint"


def config(kind: str, **knobs):
    stage = tiny_config("stage=distill", "stage.transfer=divergence", TEACHER).stage
    return replace(stage.divergence, kind=kind, **{"beta": 0.3, "temperature": 1.0, **knobs})


def logits(*shape: int, seed: int = 0, dtype=torch.float32) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slow(student_V: list[float], teacher_V: list[float], kind: str, beta: float) -> float:
    """The divergence of two distributions, written out."""

    def kl(p: list[float], q: list[float]) -> float:
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    if kind == "forward_kl":
        return kl(teacher_V, student_V)
    if kind == "reverse_kl":
        return kl(student_V, teacher_V)
    mixture = [beta * t + (1 - beta) * s for s, t in zip(student_V, teacher_V, strict=True)]
    return beta * kl(teacher_V, mixture) + (1 - beta) * kl(student_V, mixture)


def softmax(values: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp(value / temperature) for value in values]
    return [power / sum(powers) for power in powers]


def test_by_hand() -> None:
    """Student (1/2, 1/2), teacher (3/4, 1/4): KL(teacher || student) = 3/4 ln 3/2 + 1/4 ln 1/2."""
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    forward = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    reverse = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    middle = [0.625, 0.375]
    between = 0.5 * (0.75 * math.log(0.75 / middle[0]) + 0.25 * math.log(0.25 / middle[1])) + 0.5 * (
        0.5 * math.log(0.5 / middle[0]) + 0.5 * math.log(0.5 / middle[1])
    )
    for kind, expected in zip(KINDS, (forward, reverse, between), strict=True):
        assert losses.divergence(student, teacher, kind, 0.5).item() == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_vocabulary_is_compared_as_the_slow_reference_does(kind: str, temperature: float) -> None:
    student, teacher = logits(5, 11), logits(5, 11, seed=1)
    found, kl = losses.of_vocabulary(student, teacher, config(kind, temperature=temperature))
    for n in range(5):
        pair = softmax(student[n].tolist(), temperature), softmax(teacher[n].tolist(), temperature)
        assert found[n].item() == pytest.approx(slow(*pair, kind, 0.3), abs=1e-5)
        assert kl[n].item() == pytest.approx(slow(*pair, "forward_kl", 0.3), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_one_model_alone_has_do_not_count(kind: str) -> None:
    """A vocabulary is padded to a round width, to another one in each model."""
    student, teacher = logits(3, 8), logits(3, 8, seed=1)
    wide = torch.cat([teacher, torch.full((3, 4), 50.0)], -1)
    expected = losses.of_vocabulary(student, teacher, config(kind))[0]
    torch.testing.assert_close(losses.of_vocabulary(student, wide, config(kind))[0], expected)


@pytest.mark.parametrize("stored", [1, 4, 10])
@pytest.mark.parametrize("kind", KINDS)
def test_stored_probabilities_are_compared_with_one_category_for_the_rest(kind: str, stored: int) -> None:
    student, teacher = logits(6, 11), logits(6, 11, seed=1)
    top, tokens = teacher.log_softmax(-1).topk(stored)
    rest = (1 - top.exp().sum(-1)).log()
    found, _ = losses.of_stored(student, tokens, top, rest, config(kind))
    whole, _ = losses.of_vocabulary(student, teacher, config(kind))
    for n in range(6):
        p, q = softmax(student[n].tolist()), softmax(teacher[n].tolist())
        merged = [[one[i] for i in tokens[n].tolist()] for one in (p, q)]
        pair = [[*kept, 1 - sum(kept)] for kept in merged]
        assert found[n].item() == pytest.approx(slow(*pair, kind, 0.3), abs=1e-5)
        assert found[n] <= whole[n] + 1e-5, "merging categories loses information"
        assert stored < 10 or found[n].item() == pytest.approx(whole[n].item(), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_has_no_part_and_a_place_without_any_no_loss(kind: str) -> None:
    """As alignment with another tokenizer leaves it: token -1, and a place of which nothing is known."""
    student, teacher = logits(3, 7).requires_grad_(), logits(3, 7, seed=1)
    top, tokens = teacher.log_softmax(-1).topk(2)
    rest = (1 - top.exp().sum(-1)).log()
    expected = losses.of_stored(student, tokens, top, rest, config(kind))
    none = torch.full((3, 2), -1)
    wide = torch.cat([tokens, none], -1), torch.cat([top, torch.full((3, 2), -math.inf)], -1)
    found = losses.of_stored(student, *wide, rest, config(kind))
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found[0].sum(), student)
    assert gradient.isfinite().all()
    loss, kl = losses.of_stored(student, none, torch.full((3, 2), -math.inf), torch.zeros(3), config(kind))
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert not loss.any() and not kl.any() and not gradient.any()


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_that_are_all_there_is_give_a_finite_loss(kind: str) -> None:
    """Rounded to more than 1, and no token is left for the rest."""
    top, rest = torch.tensor([[0.6, 0.4004]]).log().half(), torch.tensor([-math.inf])
    student = logits(1, 2).requires_grad_()
    loss, _ = losses.of_stored(student, torch.tensor([[0, 1]]), top, rest, config(kind))
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert loss.isfinite().all() and gradient.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind: str) -> None:
    student = logits(3, 7, dtype=torch.float64).requires_grad_()
    teacher = logits(3, 7, seed=1, dtype=torch.float64)
    top, tokens = teacher.log_softmax(-1).topk(3)
    rest = (1 - top.exp().sum(-1)).log()

    def whole(x: Tensor) -> Tensor:
        return losses.divergence(x.log_softmax(-1), teacher.log_softmax(-1), kind, 0.3)

    assert torch.autograd.gradcheck(whole, student)
    narrow = student.detach().float().requires_grad_()

    def stored(x: Tensor) -> Tensor:  # in float32
        return losses.of_stored(x, tokens, top, rest, config(kind))[0].sum()

    (found,) = torch.autograd.grad(stored(narrow), narrow)
    for place in ((0, 0), (1, 3), (2, 6)):
        step = torch.zeros(3, 7)
        step[place] = 1e-2
        ends = [stored(narrow.detach() + sign * step) for sign in (1, -1)]
        assert found[place].item() == pytest.approx((ends[0] - ends[1]).item() / 2e-2, abs=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_like_its_teacher_has_no_loss_and_no_gradient(kind: str) -> None:
    student = logits(4, 9).requires_grad_()
    loss, kl = losses.of_vocabulary(student, student.detach(), config(kind))
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    assert max(x.abs().max().item() for x in (loss, kl, gradient)) < 1e-6


@pytest.mark.parametrize(
    ("kind", "beta"), [("forward_kl", 0.0), ("reverse_kl", 1.0), *[(KINDS[2], b) for b in (0.1, 0.5)]]
)
@pytest.mark.parametrize("temperature", [1.0, 0.9])
def test_divergences_and_their_gradients_are_those_of_trl(kind: str, beta: float, temperature: float) -> None:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer  # slow to import

    student, teacher = logits(2, 5, 13), logits(2, 5, 13, seed=1)
    theirs_in, ours_in = student.clone().requires_grad_(), student.clone().requires_grad_()
    labels = torch.tensor([[1, 1, -100, 1, 1], [1, -100, -100, 1, 1]])
    theirs = GKDTrainer.generalized_jsd_loss(theirs_in, teacher, labels, beta=beta, temperature=temperature)
    theirs.backward()
    learned = labels != -100
    knobs = {"temperature": temperature} | ({"beta": beta} if kind == KINDS[2] else {})
    ours = losses.of_vocabulary(ours_in[learned], teacher[learned], config(kind, **knobs))[0].mean()
    ours.backward()
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours_in.grad, theirs_in.grad)


# --- a few tokens at a time


def test_a_head_measures_logits_in_chunks_and_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = Head(8, 20), Head(6, 20)
    for head, seed in ((student, 0), (teacher, 1)):
        torch.nn.init.normal_(head.weight, generator=torch.Generator().manual_seed(seed))
    hidden, theirs = logits(7, 8).requires_grad_(), logits(7, 6, seed=2)
    most: list[int] = []

    def measure(logits_cV: Tensor, rows: slice) -> Tensor:
        most.append(logits_cV.numel())
        with torch.no_grad():
            teacher_cV = teacher(theirs[rows])
        return losses.of_vocabulary(logits_cV, teacher_cV, config("jensen_shannon"))[0]

    found = []
    for chunk in (10_000, 40):  # all seven rows, or two at a time
        monkeypatch.setattr(logprobs, "LOGITS_IN_MEMORY", chunk)
        most.clear()
        loss_N = student(hidden, measure=measure)
        found.append([loss_N, *torch.autograd.grad(loss_N.sum(), [hidden, student.weight])])
        assert max(most) <= chunk
    for whole, in_chunks in zip(*found, strict=True):
        torch.testing.assert_close(whole, in_chunks)


def test_a_head_measures_no_rows_at_all() -> None:
    """A rank whose share of a batch is empty."""
    found = Head(8, 20)(torch.zeros(0, 8), measure=lambda logits_cV, rows: logits_cV.sum(-1))
    assert found.shape == (0,)


# --- pairs


def ranking(**knobs):
    stage = tiny_config("stage=distill", "stage.transfer=ranking", TEACHER).stage
    return replace(stage.ranking, **{"target_margin": 0.0, **knobs})


def test_margins_by_hand() -> None:
    """The chosen answer's log-probability has risen by 1, the other's fallen by 2: 0.1 x 3."""
    chosen, rejected = torch.tensor([-9.0]), torch.tensor([-12.0])
    margin = losses.dpo_margins(chosen, rejected, torch.tensor([-10.0]), torch.tensor([-10.0]), 0.1)
    assert margin.item() == pytest.approx(0.3)
    assert losses.ranking_loss(margin, ranking()).item() == pytest.approx(math.log(1 + math.exp(-0.3)))
    lengths = torch.tensor([3.0]), torch.tensor([6.0])  # -3 and -2 per token
    margin = losses.simpo_margins(chosen, rejected, *lengths, 2.0)
    assert margin.item() == pytest.approx(-2.0)
    told = losses.ranking_loss(margin, ranking(target_margin=0.5)).item()
    assert told == pytest.approx(math.log(1 + math.exp(2.5)))


def pairs() -> list[Tensor]:
    """Sums of log-probabilities of the chosen, the rejected, and both under the reference."""
    return [-10 + logits(6, seed=seed) for seed in range(4)]


def test_dpo_is_trls() -> None:
    """Its DPOTrainer's sigmoid loss is -logsigmoid(beta x delta_score), inline in the training step."""
    import inspect

    from trl import DPOTrainer

    source = inspect.getsource(DPOTrainer)
    assert "per_sequence_loss = -F.logsigmoid(self.beta * delta_score)" in source
    assert "delta_score = chosen_scores - rejected_scores" in source
    chosen, rejected, *reference = pairs()
    delta = (chosen - reference[0]) - (rejected - reference[1])
    ours = losses.ranking_loss(losses.dpo_margins(chosen, rejected, *reference, 0.1), ranking())
    torch.testing.assert_close(ours, -torch.nn.functional.logsigmoid(0.1 * delta))


def test_simpo_and_its_gradients_are_those_of_trl() -> None:
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    lengths = [torch.tensor([3.0, 5, 1, 8, 2, 9]), torch.tensor([4.0, 4, 7, 1, 3, 3])]
    chosen, rejected = (sums.requires_grad_() for sums in pairs()[:2])
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"),
        loss_type="simpo",
        alpha=0.0,
        beta=2.0,
        simpo_gamma=0.7,
        label_smoothing=0.0,
    )
    theirs = CPOTrainer.cpo_loss(trainer, chosen / lengths[0], rejected / lengths[1])[0]
    margins = losses.simpo_margins(chosen, rejected, *lengths, beta=2.0)
    ours = losses.ranking_loss(margins, ranking(target_margin=0.7))
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(loss.sum(), [chosen, rejected]) for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients)


# --- tokens that the student drew


def test_a_tokens_advantage_is_minus_its_part_of_the_reverse_kl_on_average() -> None:
    student, teacher = (logits(1, 6, seed=seed).log_softmax(-1)[0] for seed in (0, 1))
    advantages = losses.teacher_advantages(student, teacher, coef=2.0)
    expected = slow(student.exp().tolist(), teacher.exp().tolist(), "reverse_kl", 0.0)
    assert (student.exp() * advantages).sum().item() == pytest.approx(-2 * expected, abs=1e-5)


def test_their_policy_gradient_is_that_of_the_reverse_kl() -> None:
    """sum p A grad log p over all tokens that could be drawn, against autograd of KL(student || teacher)."""
    scores = logits(6).double().requires_grad_()
    teacher = logits(6, seed=1).double().log_softmax(-1)
    student = scores.log_softmax(-1)
    (exact,) = torch.autograd.grad((student.exp() * (student - teacher)).sum(), scores, retain_graph=True)
    advantages = losses.teacher_advantages(student.detach(), teacher, coef=1.0)
    (found,) = torch.autograd.grad(-(student.detach().exp() * advantages * student).sum(), scores)
    torch.testing.assert_close(found, exact)


def test_with_a_discount_a_token_answers_for_those_that_follow() -> None:
    student, teacher = torch.tensor([-1.0, -2.0, -0.5]), torch.tensor([-1.5, -1.0, -4.5])
    advantages = losses.teacher_advantages(student, teacher, coef=2.0, discount=0.5)
    gaps = [-0.5, 1.0, -4.0]
    following = [gaps[0] + 0.5 * gaps[1] + 0.25 * gaps[2], gaps[1] + 0.5 * gaps[2], gaps[2]]
    assert advantages.tolist() == pytest.approx([2 * 0.5 * each for each in following])
