"""Weights in buckets: all of them, under the published names, and never the whole model on one rank."""

import torch
from hf_models import write_model
from jobs import on_two_ranks
from safetensors.torch import load_file
from shapes import SHAPES, ours

from r1pipe.model import load_pretrained
from r1pipe.model.buckets import buckets_of
from r1pipe.model.policy import named_weights


def joined(model, most_bytes: int) -> tuple[dict[str, torch.Tensor], list[int]]:
    found: dict[str, torch.Tensor] = {}
    sizes = []
    for bucket in buckets_of(model, most_bytes):
        assert not found.keys() & bucket.keys()
        found |= bucket
        sizes.append(sum(tensor.nbytes for tensor in bucket.values()))
    return found, sizes


def same(found, expected) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_buckets_are_the_published_tensors_in_pieces_of_the_given_size():
    for name in ("v3", "tied", "moonlight"):
        model = ours(SHAPES[name])
        expected = named_weights(model)
        largest = max(tensor.nbytes for tensor in expected.values())
        for most, count in ((1, len(expected)), (largest, None), (2**40, 1)):
            found, sizes = joined(model, most)
            assert same(found, expected) and max(sizes) <= max(most, largest)
            assert count is None or len(sizes) == count
        assert 2 < len(joined(model, largest)[1]) < len(expected)


def test_a_model_of_transformers_is_sent_as_its_checkpoint_is_stored(tmp_path):
    for name in ("qwen2", "qwen3_moe", "llama"):
        folder = write_model(tmp_path / name, name)
        found, sizes = joined(load_pretrained(folder), 4096)
        assert same(found, load_file(folder / "model.safetensors")) and len(sizes) > 3


def test_two_ranks_never_hold_the_whole_model(tmp_path):
    write_model(tmp_path / "qwen3_moe", "qwen3_moe")
    for name, levels in on_two_ranks("two_ranks_buckets.py", tmp_path).items():
        for level, found in levels.items():
            assert found["equal"], (name, level)
            assert found["largest_of_several"] <= 8192
        partitioned = levels["3"]
        assert 0 < partitioned["most_here"] <= max(8192, partitioned["largest_tensor"]) < partitioned["whole"]
