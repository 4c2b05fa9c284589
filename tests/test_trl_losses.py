"""On the same tensors our losses and their gradients are TRL's, where its GRPOTrainer has the variant.

Its own `_compute_loss` runs, on a trainer that was never set up: what it would ask a model for is given.
Where it defines something otherwise:
- `dapo` and `cispo` divide by the mean number of tokens over the steps of a generation batch, ours by those
  of each minibatch: the same where a batch is learned from in one step, as here.
- `bnpo` is our token mean over a micro-batch alone; ours is over the minibatch, however it is cut.
- `cispo`: its `epsilon_high` bounds the weight itself, our `clip_high` what the weight may be above 1; it has
  no lower bound, as ours at `clip=1`.
- Its KL is k3 alone, and multiplied by the ratio (`use_bias_correction_kl`) unless that is off, as here.
- The ratio of sampler and trainer is made where it samples, which cannot run here; `trl_importance` says the
  same. `geometric_mask` is not TRL's.
- Advantages (not compared) divide by the sample's standard deviation plus 1e-4, ours by the population's.
"""

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rl_runs import rollout_of
from tiny_runs import tiny_config

from r1pipe.train.rl.batch import scored_counts, weights_of
from r1pipe.train.rl.losses import policy_loss

LENGTHS = [7, 1, 4, 6, 3, 5]
LONGEST = 8  # stage.sampling.max_tokens
FLOOR, CAP = 0.9, 1.2
CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def trl_loss(logprobs_BT: torch.Tensor, given: dict, **options) -> torch.Tensor:
    """GRPOTrainer's loss; `given` are its inputs without token ids, which only the model would read."""
    from trl.trainer.grpo_trainer import GRPOTrainer  # slow to import

    trainer = object.__new__(GRPOTrainer)
    attributes = {
        "args": SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
        "accelerator": SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=True
        ),
        "model": SimpleNamespace(training=True),
        "_metrics": {"train": defaultdict(list)},
        "_get_per_token_logps_and_entropies": lambda *_, **__: (
            logprobs_BT,
            torch.zeros_like(logprobs_BT),
            None,
        ),
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "aux_loss_enabled": False,
        "current_gradient_accumulation_steps": 1,
        "_entropy_bonus_enabled": False,
        "max_completion_length": LONGEST,
        **options,
    }
    for name, value in attributes.items():
        setattr(trainer, name, value)
    ids = torch.zeros_like(given["completion_mask"])
    return trainer._compute_loss(
        trainer.model, given | {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids}
    )


def trl_importance(log_ratio_BT: torch.Tensor, mask_BT: torch.Tensor, mode: str) -> torch.Tensor:
    """Its vllm_importance_sampling_mode: [B, T], or [B, 1] of sequences."""
    log_ratio_BT = log_ratio_BT * mask_BT
    if mode.startswith("sequence"):
        log_ratio_BT = log_ratio_BT.sum(dim=-1, keepdim=True)
    ratio_BT = log_ratio_BT.exp()
    if mode.endswith("truncate"):
        return ratio_BT.clamp(min=FLOOR, max=CAP)
    return ratio_BT.masked_fill((ratio_BT < FLOOR) | (ratio_BT > CAP), 0.0)


VARIANTS = {  # ours: TRL's name for it, and its options
    "grpo": ("grpo", "token"),
    "dr_grpo": ("dr_grpo", "token"),
    "dapo": ("dapo", "token"),
    "gspo": ("grpo", "sequence"),
    "cispo": ("cispo", "token"),
    "bnpo": ("bnpo", "token"),
}


@pytest.mark.parametrize("correction", ["none", *CORRECTIONS])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("name", VARIANTS)
def test_losses_and_gradients_are_those_of_trl(name, beta, correction):
    loss_type, level = VARIANTS[name]
    words = ["stage.loss=grpo", "stage.loss_aggregation=token"] if name == "bnpo" else [f"stage.loss={name}"]
    stage = tiny_config("stage=grpo", *words, f"stage.kl_coef={beta}", "stage.clip=0.2").stage
    if name in ("gspo", "cispo"):  # with their own bounds
        stage = tiny_config("stage=grpo", *words, f"stage.kl_coef={beta}").stage
    clip_high = stage.clip if stage.clip_high is None else stage.clip_high

    torch.manual_seed(3)
    shape = (len(LENGTHS), max(LENGTHS))
    mask_BT = (torch.arange(shape[1]) < torch.tensor(LENGTHS).unsqueeze(1)).long()
    spread = 1e-3 if name == "gspo" else 0.4  # about as wide as the clip range
    old_BT = -2 + torch.randn(shape)
    logprobs_BT = old_BT + spread * torch.randn(shape)
    reference_BT = old_BT + 0.5 * torch.randn(shape)
    corrected = correction != "none"
    sampled_BT = old_BT + 0.1 * torch.randn(shape) if corrected else old_BT
    advantages_B = torch.randn(shape[0])

    theirs_BT = logprobs_BT.clone().requires_grad_()
    given = {
        "completion_mask": mask_BT,
        "advantages": advantages_B,
        "old_per_token_logps": old_BT,
        "ref_per_token_logps": reference_BT,
        "num_items_in_batch": mask_BT.sum(),
        "importance_sampling_ratio": trl_importance(old_BT - sampled_BT, mask_BT, correction),
    }
    theirs = trl_loss(
        theirs_BT,
        given,
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=beta,
        epsilon_low=stage.clip,
        epsilon_high=clip_high + (name == "cispo"),
        use_vllm=corrected,
        vllm_importance_sampling_correction=corrected,
    )
    theirs.backward()

    ours_BT = logprobs_BT.clone().requires_grad_()
    rollouts = [rollout_of([1], [5] * n, [0.0] * n) for n in LENGTHS]
    weights_B = torch.tensor(weights_of(rollouts, stage.loss_aggregation, *scored_counts(rollouts), LONGEST))
    ours = torch.zeros(())
    for rows in (slice(0, 2), slice(2, 6)):  # two micro-batches of one minibatch
        lengths_B, kept_BT = torch.tensor(LENGTHS[rows]), mask_BT[rows].bool()
        result = policy_loss(
            ours_BT[rows][kept_BT],
            sampled_BT[rows][kept_BT],
            advantages_B[rows].repeat_interleave(lengths_B),
            weights_B[rows].repeat_interleave(lengths_B),
            lengths_B,
            replace(stage, importance=correction, importance_cap=CAP, importance_floor=FLOOR),
            reference_BT[rows][kept_BT] if beta else None,
            old_BT[rows][kept_BT] if corrected else None,
        )
        assert result.sums["tokens"] == lengths_B.sum()
        ours = ours + result.loss
    ours.backward()

    assert theirs_BT.grad.abs().max() > 1e-3, "something must be learned"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(ours_BT.grad, theirs_BT.grad, rtol=0, atol=1e-6)
