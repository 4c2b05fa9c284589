"""GRPO in exact numbers: losses, advantages, micro-batches, and the loop on a tiny model."""

import math

import pytest
import torch

from r1pipe.model import logprobs
from r1pipe.records import Completion, Group, Prompt
from r1pipe.rl import losses
from r1pipe.rl.advantages import group_advantages, has_variance
from r1pipe.rl.batch import Rollout, by_length, collate, rollouts_of, scored_counts, split_evenly, weights_of

NAN = math.nan


def rollout(prompt: list[int], completion: list[int], advantage: float = 1.0, scored: bool = True) -> Rollout:
    return Rollout(prompt, completion, [-0.5] * len(completion), advantage, scored)


# --- losses


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def test_kl_is_the_unbiased_estimator_and_never_negative():
    kl_N = losses.kl_unbiased(logs(0.5, 0.5, 0.2), logs(0.25, 0.5, 0.4))
    expected = [0.5 - math.log(0.5) - 1, 0.0, 2 - math.log(2) - 1]
    assert kl_N.tolist() == pytest.approx(expected, abs=1e-6)
    assert (losses.kl_unbiased(torch.randn(1000), torch.randn(1000)) >= 0).all()


def test_kl_estimates_the_divergence_on_average():
    policy, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    expected = (policy * (policy / reference).log()).sum()
    estimate = (policy * losses.kl_unbiased(policy.log(), reference.log())).sum()
    assert estimate.item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "slope"),
    [
        (1.5, 2.0, 2.4, 0.0),  # good and already far more likely: held at 1.2
        (1.5, -2.0, -3.0, -2.0),  # bad and more likely: full gradient
        (0.5, -2.0, -1.6, 0.0),  # bad and already far less likely: held at 0.8
        (0.5, 2.0, 1.0, 2.0),  # good and less likely: full gradient
        (1.1, 2.0, 2.2, 2.0),
    ],
)
def test_clip_takes_the_gradient_only_where_it_should(ratio, advantage, value, slope):
    ratio_N = torch.tensor([ratio], requires_grad=True)
    surrogate = losses.clipped_surrogate(ratio_N, torch.tensor([advantage]), clip=0.2)
    surrogate.sum().backward()
    assert surrogate.item() == pytest.approx(value)
    assert ratio_N.grad.item() == pytest.approx(slope)


def test_policy_loss_and_its_gradient_by_hand():
    logprobs_N = logs(0.5, 0.2, 0.3).requires_grad_()
    result = losses.policy_loss(
        logprobs_N,
        old_N=logs(0.5, 0.1, 0.3),
        advantages_N=torch.tensor([1.0, 1.0, -2.0]),
        weights_N=torch.tensor([0.25, 0.5, 0.0]),  # the last token's reward failed
        clip=0.2,
        reference_N=logs(0.25, 0.2, 0.9),
        kl_coef=0.1,
    )
    result.loss.backward()
    kl = 0.5 + math.log(2) - 1
    assert result.loss.item() == pytest.approx(0.25 * (0.1 * kl - 1) + 0.5 * (0 - 1.2))
    # d/dlogprob: -A ratio inside the clip, 0 outside; KL gives 1 - pi_ref/pi
    assert logprobs_N.grad.tolist() == pytest.approx([0.25 * (0.1 * 0.5 - 1), 0.0, 0.0], abs=1e-7)
    assert result.tokens == 2 and result.clipped_sum == 1
    assert result.kl_sum.item() == pytest.approx(kl)
    assert result.ratio_max.item() == pytest.approx(2.0)
    assert result.gap_sum.item() == pytest.approx(math.log(2))


def test_logprobs_in_chunks_equal_the_whole(monkeypatch):
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 11, bias=False)
    hidden_ND = torch.randn(7, 6, requires_grad=True)
    targets_N = torch.randint(11, (7,))

    def run(temperature):
        result_N = logprobs.token_logprobs(head, hidden_ND, targets_N, 11, temperature)
        return result_N, torch.autograd.grad(result_N.exp().sum(), [hidden_ND, head.weight])

    expected = torch.log_softmax(head(hidden_ND) / 0.7, -1).gather(1, targets_N[:, None])[:, 0]
    whole, whole_grads = run(0.7)
    monkeypatch.setattr(logprobs, "LOGITS_IN_MEMORY", 22)  # two tokens at a time
    chunked, chunked_grads = run(0.7)
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(chunked, whole)
    torch.testing.assert_close(chunked_grads, whole_grads)
    assert not torch.allclose(run(1.0)[0], chunked), "the temperature must matter"


# --- advantages


def test_advantages_of_a_hand_worked_group():
    assert group_advantages([1.0, 0.0, 0.0, 1.0], True) == [1.0, -1.0, -1.0, 1.0]
    assert group_advantages([3.0, 0.0, 0.0], True) == pytest.approx([2**0.5, -(0.5**0.5), -(0.5**0.5)])
    assert group_advantages([3.0, 0.0, 0.0], False) == [2.0, -1.0, -1.0]


def test_a_failed_score_counts_for_nothing_in_its_group():
    assert group_advantages([1.0, NAN, 0.0], True) == [1.0, 0.0, -1.0]
    assert group_advantages([NAN, NAN], True) == [0.0, 0.0]
    assert not has_variance([NAN, 1.0, NAN])


def test_a_group_without_variance_teaches_nothing():
    same = [0.1 + 0.2, 0.3, 0.3]  # rounding is not variance
    assert not has_variance(same)
    assert group_advantages(same, True) == [0.0, 0.0, 0.0]


# --- micro-batches


def test_groups_become_rollouts_and_failed_ones_weigh_nothing():
    completions = [Completion([7, 2], [-0.1, -0.2], "stop"), Completion([8], [-0.3], "length")]
    group = Group(Prompt("p", "word", "en", "?"), completions, [{}, {}], [1.0, NAN], [0.5, 0.0])
    first, second = rollouts_of([group], [[1, 5]])
    assert (first.prompt, first.completion, first.old, first.advantage) == ([1, 5], [7, 2], [-0.1, -0.2], 0.5)
    assert scored_counts([first, second]) == (1.0, 2.0)
    assert weights_of([first, second], "token", 1.0, 2.0) == [0.5, 0.0]


def test_sequence_mean_and_token_mean_weigh_lengths_differently():
    rollouts = [rollout([1], [5, 6, 2]), rollout([1], [2])]
    sequences, tokens = scored_counts(rollouts)
    assert weights_of(rollouts, "sequence", sequences, tokens) == [pytest.approx(1 / 6), 0.5]
    assert weights_of(rollouts, "token", sequences, tokens) == [0.25, 0.25]


def test_micro_batches_are_sorted_by_length_and_never_pad_beyond_the_limit():
    lengths = [3, 9, 4, 10, 2, 30, 5]
    batches = by_length([rollout([1], [3] * (length - 1)) for length in lengths], micro_tokens=20)
    assert [[len(r) for r in batch] for batch in batches] == [[30], [10, 9], [5, 4, 3, 2]]
    assert all(len(batch) * len(batch[0]) <= 20 for batch in batches[1:])


def test_minibatches_are_disjoint_and_complete():
    rollouts = [rollout([1], [i]) for i in range(8)]
    halves = split_evenly(rollouts, 2)
    assert [len(half) for half in halves] == [4, 4]
    assert [*halves[0], *halves[1]] == rollouts


def test_collate_points_at_completion_tokens_only_and_learns_eos():
    eos = 2
    micro = collate(
        [rollout([1, 5], [7, 8, eos], advantage=1.0), rollout([1], [9, eos], advantage=-1.0)],
        weights=[0.1, 0.2],
        device=torch.device("cpu"),
    )
    assert micro.tokens_BT.tolist() == [[1, 5, 7, 8, 2], [1, 9, 2, 1, 9]]
    assert micro.sources_N.tolist() == [1, 2, 3, 5, 6]
    assert micro.targets_N.tolist() == [7, 8, eos, 9, eos]
    assert micro.advantages_N.tolist() == [1, 1, 1, -1, -1]
    assert micro.weights_N.tolist() == pytest.approx([0.1, 0.1, 0.1, 0.2, 0.2])
    assert micro.reference_N is None
