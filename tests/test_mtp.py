"""Multi-token prediction against a loop over positions, its document boundaries, and its checkpoint."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from shapes import ours, tiny, tokens

from r1pipe.config import ModelConfig
from r1pipe.model import DeepseekV3, load_pretrained, save_pretrained
from r1pipe.model.cache import Decoder, LatentCache
from r1pipe.model.moe import gates
from r1pipe.model.mtp import mtp_loss_sum, stored_copies
from r1pipe.model.names import CONFIG
from r1pipe.model.reading import WEIGHTS

SEGMENTS = torch.tensor([[1] * 6 + [2] * 4 + [3] * 2, [1] * 9 + [0] * 3])
LEARNED = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1], [0, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0]]).bool()


def with_mtp(depths: int, **changes) -> ModelConfig:
    return tiny(num_nextn_predict_layers=depths, **changes)


def loss_of(model: DeepseekV3, tokens_BT: torch.Tensor) -> torch.Tensor:
    hidden_BTD = model.hidden(tokens_BT, SEGMENTS)
    depths = model.model.mtp_hidden(hidden_BTD, tokens_BT, SEGMENTS)
    return mtp_loss_sum(model.lm_head, depths, tokens_BT, SEGMENTS, LEARNED)


def slow_loss(model: DeepseekV3, tokens_BT: torch.Tensor) -> torch.Tensor:
    """V3 equations 21 to 25 as they stand: document by document, depth by depth, position by position."""
    trunk, total = model.model, torch.zeros(())
    table = trunk.rotary.table(tokens_BT.device)
    for row, segments in enumerate(SEGMENTS):
        for number in sorted(set(segments.tolist()) - {0}):
            places = (segments == number).nonzero().squeeze(1)
            t, learned = tokens_BT[row, places], LEARNED[row, places]
            h = model.hidden(t.unsqueeze(0))[0]  # h^0
            for k in range(1, model.config.num_nextn_predict_layers + 1):
                layer = trunk.layers[model.config.num_hidden_layers + k - 1]
                count = len(t) - k  # positions that have a token k further on
                if count < 1:
                    break
                joined = [
                    layer.eh_proj(torch.cat([layer.enorm(trunk.embed_tokens(t[i + k])), layer.hnorm(h[i])]))
                    for i in range(count)
                ]
                ((out,),) = layer(torch.stack(joined).unsqueeze(0), table[:count].unsqueeze(0), None)
                h = torch.stack([layer.shared_head.norm(out[i]) for i in range(count)])
                for i in range(count - 1):
                    if learned[i + k + 1]:
                        total = total - model.lm_head(h[i]).log_softmax(-1)[t[i + k + 1]]
    return total / model.config.num_nextn_predict_layers


@pytest.mark.parametrize("depths", [1, 2])
def test_loss_and_gradients_equal_a_loop_over_positions(depths):
    grads = []
    for loss in (loss_of, slow_loss):
        model = ours(with_mtp(depths))
        value = loss(model, tokens(2, 12, model.config))
        value.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()} | {"loss": value.detach()})
    fast, slow = grads
    for name, expected in slow.items():
        torch.testing.assert_close(
            fast[name], expected, atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    first = f"model.layers.{ours(with_mtp(depths)).config.num_hidden_layers}"
    for part in ("eh_proj", "enorm", "hnorm", "shared_head.norm", "self_attn.kv_b_proj", "mlp.gate"):
        assert slow[f"{first}.{part}.weight"].norm() > 0


def test_another_document_changes_nothing():
    model = ours(with_mtp(2))
    tokens_BT = tokens(2, 12, model.config)
    other_BT = tokens_BT.clone()
    other_BT[0, :6] = (other_BT[0, :6] + 1) % model.config.vocab_size  # the first document of the first row
    found = []
    for rows_BT in (tokens_BT, other_BT):
        hidden_BTD = model.hidden(rows_BT, SEGMENTS)
        depths = model.model.mtp_hidden(hidden_BTD, rows_BT, SEGMENTS)
        seen = LEARNED.clone()
        seen[0, :6] = False
        found.append(mtp_loss_sum(model.lm_head, depths, rows_BT, SEGMENTS, seen))
    assert found[0] > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)  # other groups of experts, other sums


def test_the_half_of_the_embedding_comes_first():
    model = ours(with_mtp(1))
    layer = model.model.layers[-1]
    with torch.no_grad():
        layer.eh_proj.weight[:, model.config.hidden_size :] = 0
    embedding, hidden = torch.randn(
        2, 3, model.config.hidden_size, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(layer.joined(hidden, embedding), layer.joined(hidden + 1, embedding))
    assert not torch.equal(layer.joined(hidden, embedding), layer.joined(hidden, embedding * 2 + 1))


@torch.no_grad()
def test_the_model_itself_does_not_change_and_decodes_without_them():
    model, plain = ours(with_mtp(1)), ours(tiny())
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()})
    tokens_BT = tokens(2, 12, model.config)
    assert torch.equal(model(tokens_BT), plain(tokens_BT))
    entries_LBTW, _ = Decoder(model).prefill(tokens_BT[:, :8], torch.tensor([8, 8]))
    cache = LatentCache(model, 2, 12)
    cache.fill(torch.tensor([0, 1]), entries_LBTW, torch.tensor([0, 1]))
    logits_SV = Decoder(model).decode(tokens_BT[:, 8], torch.tensor([8, 8]), cache, 9)
    torch.testing.assert_close(logits_SV, plain(tokens_BT)[:, 8], atol=1e-4, rtol=0)


def test_dropping_and_freezing():
    model = ours(with_mtp(2))
    model.freeze_mtp()
    frozen = {name.split(".")[2] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"3", "4"}
    model.drop_mtp()
    assert len(gates(model)) == 2 and model.config == model.model.config == tiny()


def test_checkpoints_hold_them_with_copies_of_embedding_and_head(tmp_path):
    model = ours(with_mtp(1))
    save_pretrained(model, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    for copy, original in stored_copies(model.config).items():
        assert torch.equal(stored[copy], stored[original])
    assert {"model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"} <= stored.keys()
    assert stored["model.layers.3.eh_proj.weight"].shape == (64, 128)
    loaded = load_pretrained(tmp_path)
    assert dataclasses.replace(loaded.config, name="tiny") == model.config
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_a_checkpoint_that_names_a_layer_without_storing_it_has_none(tmp_path):
    model = ours(tiny())
    save_pretrained(model, tmp_path)
    content = json.loads((tmp_path / CONFIG).read_text()) | {"num_nextn_predict_layers": 1}
    (tmp_path / CONFIG).write_text(json.dumps(content))
    assert load_pretrained(tmp_path).config.num_nextn_predict_layers == 0


def test_copies_may_be_left_out(tmp_path):
    model = ours(with_mtp(1))
    save_pretrained(model, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    save_file({k: v for k, v in stored.items() if k not in stored_copies(model.config)}, tmp_path / WEIGHTS)
    assert torch.equal(load_pretrained(tmp_path).lm_head.weight, model.lm_head.weight)
