"""Models sharded over the ranks: loaded as whole ones are, trained and read alike."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hf_models import write_model
from jobs import OPTIM, ROUTER, engine_config, launched, on_two_ranks, tiny, tiny_model
from test_engine import batch, loss_of

from r1pipe.model import DeepseekV3, Policy, load_pretrained, save_pretrained
from r1pipe.model.kernels import training as kernels
from r1pipe.model.saving import write_pretrained
from r1pipe.rewards.models import RewardModel, save_reward_model
from r1pipe.train.engine import patches
from r1pipe.train.engine.engine import Engine
from r1pipe.train.engine.memory import elements, keeping_no_weights
from r1pipe.train.engine.sharded import load_sharded, new_sharded


def losses(model: Policy, ranks: int, precision: str, level: int = 3) -> list[float]:
    """Of three steps on this rank's share of the batch."""
    engine = Engine(model, OPTIM, ROUTER, engine_config(ranks, level, precision), 10)
    rows = batch()[engine.rank :: ranks]
    found = [engine.train_step([partial(loss_of, engine.module, rows)]).loss for _ in range(3)]
    engine.evaluate([partial(loss_of, engine.module, rows)])  # and no weights stay on their way
    with engine.gathered() as whole:
        assert all(weight.numel() == elements(weight) for weight in whole.parameters())
    return found


def weights(model: Policy) -> dict[str, torch.Tensor]:
    """Of a sharded model."""
    with patches.whole([*model.parameters()]):
        return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_sharded_model_is_the_stored_one(tmp_path: Path, precision: str) -> None:
    save_pretrained(tiny_model(), tmp_path)
    stored = load_pretrained(tmp_path)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model = load_sharded(tmp_path, engine_config(1, 3, precision))
    found = weights(model)
    assert found.keys() == stored.state_dict().keys()
    for name, tensor in stored.to(dtype).state_dict().items():
        assert torch.equal(found[name], tensor), name
    assert losses(model, 1, precision) == losses(load_pretrained(tmp_path), 1, precision)


def test_initial_weights_are_those_of_a_whole_model() -> None:
    shape, drawn = tiny("pretrain").model, torch.Generator().manual_seed(0)
    found = weights(new_sharded(shape, drawn, engine_config(1, 3)))
    assert all(torch.equal(found[name], tensor) for name, tensor in tiny_model().state_dict().items())


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_a_sharded_model_of_transformers_is_the_stored_one(tmp_path: Path, family: str) -> None:
    folder = write_model(tmp_path / family, family)
    stored = load_pretrained(folder).float()
    found = weights(load_sharded(folder, engine_config(1, 3)))
    assert found.keys() == stored.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in stored.state_dict().items())


def test_a_checkpoint_is_written_piece_by_piece_as_from_the_whole(tmp_path: Path) -> None:
    shape = replace(tiny("pretrain").model, num_nextn_predict_layers=1, tie_word_embeddings=True)
    save_pretrained(DeepseekV3(shape), tmp_path / "bundled")
    for place in (tmp_path / "bundled", write_model(tmp_path / "qwen3_moe", "qwen3_moe")):
        engine = Engine(load_sharded(place, engine_config(1, 3)), OPTIM, ROUTER, engine_config(1, 3), 10)
        engine.train_step([partial(loss_of, engine.module, batch())])
        write_pretrained(engine.module, engine.tensors(), tmp_path / "pieces")
        with engine.gathered() as model:
            save_pretrained(model, tmp_path / "whole")
        for name in ("config.json", "model.safetensors"):
            pieces, whole = (tmp_path / folder / name for folder in ("pieces", "whole"))
            assert pieces.read_bytes() == whole.read_bytes() != (place / name).read_bytes() or name[0] == "c"


@pytest.mark.parametrize("compiled", [True, False])
def test_a_backward_pass_takes_the_weights_as_they_were_gathered_again(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(kernels, "usable", lambda *given, **more: False)
    model = tiny_model()
    parameters = [*model.parameters()]
    expected = torch.autograd.grad(loss_of(model, batch()), parameters)
    for number, parameter in enumerate(parameters):
        setattr(parameter, "ds_id", number)  # noqa: B010  as DeepSpeed marks what it partitions
    with keeping_no_weights():
        loss = loss_of(model, batch())
    for parameter in parameters:  # released, and gathered into other memory
        first, parameter.data = parameter.data, parameter.data.clone()
        first.fill_(math.nan)
    for found, gradient in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
        assert torch.equal(found, gradient)


@pytest.mark.slow
def test_two_ranks_each_have_half_and_compute_as_with_the_whole(tmp_path: Path) -> None:
    save_pretrained(tiny_model(), tmp_path)
    for kind, trunk in (("judge", tiny_model()), ("qwen2", load_pretrained(write_model(tmp_path, "qwen2")))):
        judge = RewardModel(trunk)
        torch.nn.init.normal_(judge.score.weight)
        save_reward_model(judge, tmp_path / kind)
    for precision, told in on_two_ranks("two_ranks_sharded.py", tmp_path).items():
        for of_rank in told:
            assert of_rank["losses"] == of_rank["of whole"], precision
            assert of_rank["read"] == of_rank["read whole"], precision
            assert of_rank["share"] == pytest.approx(0.5, rel=1e-3)
            assert of_rank["judged"], precision
            assert of_rank["drawn from"], precision
            assert of_rank["moved"] and of_rank["restored"] and of_rank["equal"], precision


# What ranks share of each weight, in bytes: in bfloat16 itself 2, its master 4, gradient 4 and moments 8;
# while the optimizer steps a copy of the gradient 4, beside the bucket of a quarter of all; the reference 2.
SHARED = {"sft": 22.5, "reward_model": 22.5, "grpo": 24.5}
FIXED = 128  # MiB whatever their number; the parts are in docs/lab-notes.md
WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 10, "first_k_dense_replace": 9}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("training", [*SHARED])
def test_the_memory_of_a_rank_falls_as_their_number_grows(tmp_path: Path, training: str, ranks: int) -> None:
    model = DeepseekV3(replace(tiny("pretrain").model, **WIDE))
    save_pretrained(model, tmp_path)
    (tmp_path / training).mkdir()
    share = sum(parameter.numel() for parameter in model.parameters()) / ranks * SHARED[training] / 2**20
    for most in launched("ranks_memory.py", tmp_path / training, ranks):
        assert most < share + FIXED
