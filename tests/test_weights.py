"""Weights in and out: published checkpoints of every kind, the same bits again, clear refusals."""

import dataclasses
import json
import math
import os
import shutil
import stat
import weakref
from pathlib import Path

import jinja2
import pytest
import torch
from published import alter, file_of, forget, promise, publish, stored_in
from safetensors.torch import load_file, save_file
from shapes import SHAPES, V2_SHAPES, YARN, ours, tiny, tokens
from tiny_runs import load_stage
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3ForCausalLM

from r1pipe.chat.template import BOS, EOS, PAD, TOKENIZER_FILES, Chat
from r1pipe.cli import commands as cli
from r1pipe.config import script_options
from r1pipe.config.compose import compose
from r1pipe.config.script_options import ExportOptions, ImportOptions
from r1pipe.core.errors import CheckpointError, ConfigError
from r1pipe.core.paths import content_dir
from r1pipe.core.types import Prompt
from r1pipe.launch import command as launch
from r1pipe.model import expert_loads, model_config_from
from r1pipe.model.kernels.reference import Scaled, dequantise, quantise_blocks
from r1pipe.model.moe import gates
from r1pipe.model.names import CONFIG
from r1pipe.model.reading import GENERATION, INDEX, WEIGHTS
from r1pipe.model.shards import write_shards
from r1pipe.model.weights import convert, load_pretrained, save_pretrained
from r1pipe.runs import checkpoints, lineage

RAGGED = tiny(hidden_size=160, intermediate_size=200, n_routed_experts=4, num_experts_per_tok=2, n_group=2)
EXPERT = "model.layers.2.mlp.experts.3.down_proj.weight"
SCALE = EXPERT + "_scale_inv"


def same_bits(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)), name


# --- our own checkpoints


@pytest.mark.parametrize("name", ["v3_yarn", "tied", "v2_lite"])
def test_checkpoint_round_trip(name, tmp_path):
    model = ours((SHAPES | V2_SHAPES)[name])
    save_pretrained(model, tmp_path)
    names = load_file(tmp_path / WEIGHTS).keys()
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in names
    assert not any("gate_up" in key or "tokens_per_expert" in key for key in names)
    loaded = load_pretrained(tmp_path)
    assert dataclasses.replace(loaded.config, name="tiny") == model.config
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    assert expert_loads(loaded).sum() == 0
    tokens_BT = tokens(1, 9, model.config)
    assert torch.equal(loaded(tokens_BT), model(tokens_BT))


def test_saved_in_bfloat16_the_bias_stays_float32(tmp_path):
    save_pretrained(ours(SHAPES["v3"]), tmp_path, torch.bfloat16)
    stored = load_file(tmp_path / WEIGHTS)
    assert stored["lm_head.weight"].dtype == torch.bfloat16
    assert stored["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    loaded = load_pretrained(tmp_path)
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert gates(loaded)[0].e_score_correction_bias.dtype == torch.float32


def test_shards_are_bounded_listed_and_one_at_a_time_in_memory(tmp_path):
    alive: weakref.WeakSet = weakref.WeakSet()
    most = 0

    def drawn():
        nonlocal most
        for number in range(20):
            tensor = torch.full((100,), float(number))
            alive.add(tensor)
            most = max(most, len(alive))
            yield f"t{number:02}", tensor
            del tensor

    write_shards(drawn(), tmp_path, shard_bytes=1600)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [f"model-{n:05}-of-00005.safetensors" for n in range(1, 6)]
    assert most <= 5  # the four of a shard, and the one that opens the next
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 20 * 400
    assert all(name in load_file(tmp_path / file) for name, file in index["weight_map"].items())
    assert all(stored_in(tmp_path)[f"t{n:02}"][0] == n for n in range(20))


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_files_of_weights_honour_the_umask(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        save_pretrained(ours(SHAPES["v3"]), tmp_path, shard_bytes=100_000)
    finally:
        os.umask(before)
    files = [*tmp_path.glob("*.safetensors")]
    assert len(files) > 1 and {stat.S_IMODE(path.stat().st_mode) for path in files} == {mode}


# --- FP8


def test_dequantising_equals_a_loop_over_elements():
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(130, 259, generator=generator) * 100).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 3, generator=generator)
    expected = torch.empty(130, 259)
    for row in range(130):
        for column in range(259):
            expected[row, column] = weight[row, column].float() * scale[row // 128, column // 128]
    assert torch.equal(dequantise(Scaled(weight, scale), torch.bfloat16), expected.bfloat16())


def test_quantising_keeps_each_block_within_half_a_step():
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(0)) * 0.02
    weight[:128, :128] *= 1000  # blocks must not share a scale
    weight[128:, 256:] = 0
    eighth, scale = quantise_blocks(weight)
    assert eighth.dtype == torch.float8_e4m3fn and scale.shape == (2, 3) and scale.dtype == torch.float32
    assert scale[0, 1].item() == pytest.approx(weight[:128, 128:256].abs().max().item() / 448)
    assert scale[1, 2] > 0 and not eighth[128:, 256:].float().any()
    steps = scale.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :300]
    gap = (eighth.float() * steps - weight).abs()
    assert (gap <= weight.abs() / 16 + steps * 2**-10 + 1e-9).all()


def test_an_fp8_checkpoint_loads_as_its_products_in_bfloat16(tmp_path):
    tensors = publish(tmp_path, RAGGED, "fp8")
    experts = load_pretrained(tmp_path).model.layers[2].mlp.experts
    assert experts.down_proj.dtype == torch.bfloat16
    assert torch.equal(
        experts.down_proj[3], dequantise(Scaled(tensors[EXPERT], tensors[SCALE]), torch.bfloat16)
    )


# --- in and out


@pytest.mark.parametrize("mtp", [0, 1])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp8"])
def test_import_and_export_return_the_same_bits(kind, mtp, tmp_path, capsys):
    tensors = publish(tmp_path / "theirs", RAGGED, kind, mtp)
    for name in TOKENIZER_FILES:
        shutil.copy(content_dir() / "tokenizer" / name, tmp_path / "theirs" / name)
    stage = load_stage("import_weights")
    stage.main(ImportOptions(tmp_path / "theirs", tmp_path / "ours", None, 5.0))
    told = capsys.readouterr().out
    assert ("MTP layers travel along" in told) == bool(mtp)
    assert "no tokenizer taken: it has 1152 tokens, the embedding 97 rows" in told
    checkpoints.verify(tmp_path / "ours")
    stage = load_stage("export")
    stage.main(ExportOptions(tmp_path / "ours", tmp_path / "out", None, 3e-4))
    assert "logits are the same" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    same_bits(tensors, stored_in(tmp_path / "out"))
    before, after = (json.loads((tmp_path / where / CONFIG).read_text()) for where in ("theirs", "out"))
    assert before == after
    load_pretrained(tmp_path / "out")


@pytest.mark.parametrize("kind", ["fp32", "fp8"])
def test_export_casts(kind, tmp_path):
    tensors = publish(tmp_path / "theirs", RAGGED, kind, mtp=1)
    convert(tmp_path / "theirs", tmp_path / "bf16", "bfloat16")
    convert(tmp_path / "theirs", tmp_path / "fp8", "fp8")
    stored = stored_in(tmp_path / "bf16")
    assert {tensor.dtype for name, tensor in stored.items() if "bias" not in name} == {torch.bfloat16}
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / CONFIG).read_text())
    eighth = stored_in(tmp_path / "fp8")
    assert eighth[EXPERT].dtype == torch.float8_e4m3fn and SCALE in eighth and SCALE not in stored
    assert eighth["model.layers.3.eh_proj.weight"].dtype == torch.bfloat16
    if kind == "fp8":
        same_bits(tensors, eighth)
    else:
        apart = (
            (dequantise(Scaled(eighth[EXPERT], eighth[SCALE]), torch.bfloat16).float() - tensors[EXPERT])
            .abs()
            .max()
        )
        assert 0 < apart < tensors[EXPERT].abs().max() / 16
    assert load_pretrained(tmp_path / "fp8").lm_head.weight.dtype == torch.bfloat16


def test_buffers_that_config_json_gives_are_ignored(tmp_path):
    """Moonlight's files hold the frequencies of its rotary positions."""
    publish(tmp_path / "theirs", RAGGED, "bf16")
    before = load_pretrained(tmp_path / "theirs").state_dict()
    extra = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(2)}
    index = json.loads((tmp_path / "theirs" / INDEX).read_text())
    index["weight_map"] |= dict.fromkeys(extra, "extra.safetensors")
    (tmp_path / "theirs" / INDEX).write_text(json.dumps(index))
    save_file(extra, tmp_path / "theirs" / "extra.safetensors")
    same_bits(before, load_pretrained(tmp_path / "theirs").state_dict())
    convert(tmp_path / "theirs", tmp_path / "ours")
    assert not extra.keys() & stored_in(tmp_path / "ours").keys()


def test_mtp_layers_that_were_left_out_are_no_mistake(tmp_path):
    publish(tmp_path / "theirs", RAGGED, "bf16", mtp=0)
    content = json.loads((tmp_path / "theirs" / CONFIG).read_text()) | {"num_nextn_predict_layers": 1}
    (tmp_path / "theirs" / CONFIG).write_text(json.dumps(content))
    convert(tmp_path / "theirs", tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / CONFIG).read_text())["num_nextn_predict_layers"] == 0


@torch.no_grad()
@pytest.mark.parametrize("name", ["v3_yarn", "moonlight"])
def test_what_transformers_saves_comes_in(name, tmp_path):
    save_pretrained(ours(SHAPES[name]), tmp_path / "first")
    other = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "first", attn_implementation="eager").eval()
    other.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    content = json.loads((tmp_path / "theirs" / CONFIG).read_text())
    assert "rope_parameters" in content and "rope_theta" not in content, (
        "transformers spells it in our way now"
    )
    for key in ("topk_method", "scoring_func"):  # it keeps what it has read, but writes none of its own
        content.pop(key, None)
    (tmp_path / "theirs" / CONFIG).write_text(json.dumps(content))
    convert(tmp_path / "theirs", tmp_path / "ours")
    tokens_BT = tokens(1, 40, other.config)
    model = load_pretrained(tmp_path / "ours")
    torch.testing.assert_close(model(tokens_BT), other(tokens_BT).logits, atol=1e-4, rtol=0)
    published = json.loads((tmp_path / "ours" / CONFIG).read_text())
    assert (published["topk_method"], published["scoring_func"]) == ("noaux_tc", "sigmoid")


@torch.no_grad()
def test_transformers_loads_the_exported_base_as_it_is(tmp_path, capsys):
    out = tmp_path / "out"
    stage = load_stage("export")
    stage.main(ExportOptions(content_dir() / "base", out, "float32", 5.0))
    assert "transformers' differ by" in capsys.readouterr().out
    other, model = AutoModelForCausalLM.from_pretrained(out).eval(), load_pretrained(out).eval()
    tokens_BT = tokens(3, 200, model.config)
    torch.testing.assert_close(model(tokens_BT), other(tokens_BT).logits, atol=1e-4, rtol=0)
    chat, tokenizer = Chat.load(out), AutoTokenizer.from_pretrained(out)
    for question in ("Use 9, 25, 3 and 14 to make 17.", "用 3、5 和 7 凑出 22。", "  two\n\nlines <think>"):
        asked = [{"role": "user", "content": question}]
        theirs = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        assert theirs == chat.prompt_tokens(Prompt("", "", "", question))
        turns = [*asked, {"role": "assistant", "content": "<think>\na\n</think>\n\nb"}, *asked]
        assert tokenizer.apply_chat_template(turns, tokenize=False) == chat.render(turns, False)
    system = {
        "role": "system",
        "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": " brief."}],
    }
    for conversation in ([system, *turns], [*turns, {"role": "developer", "content": "So."}]):
        assert tokenizer.apply_chat_template(conversation, tokenize=False) == chat.render(conversation, False)
    with pytest.raises(jinja2.TemplateError, match="no place for messages of tool"):
        tokenizer.apply_chat_template([*asked, {"role": "tool", "content": "7"}], tokenize=False)
    with pytest.raises(jinja2.TemplateError, match="no place for tools"):
        tokenizer.apply_chat_template(asked, tools=[{"type": "function"}], tokenize=False)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (BOS, EOS, PAD)
    assert other.generation_config.eos_token_id == chat.eos_id == model.eos_ids[0]


def test_an_export_has_its_system_prompt_as_the_templates_default(tmp_path, capsys):
    prompted, out = base_with(tmp_path / "prompted"), tmp_path / "out"
    Chat.load(prompted, 'Say "so" {{ x }} 🙂\n').save(content_dir() / "base", prompted)
    checkpoints.write_manifest(prompted)
    load_stage("export").main(ExportOptions(prompted, out, None, 5.0))
    assert "the chat template has the system prompt" in capsys.readouterr().out
    tokenizer, chat = AutoTokenizer.from_pretrained(out), Chat.load(out)
    assert chat.system == 'Say "so" {{ x }} 🙂\n'
    asked, own = {"role": "user", "content": "why?"}, {"role": "system", "content": "Own."}
    for conversation in ([asked], [own, asked]):
        theirs = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        assert theirs == chat.render(conversation, True)
        assert ("Say" in theirs) == (len(conversation) == 1)


def test_a_template_of_several_lines_reads_as_in_transformers(tmp_path):
    template = """{% for m in messages %}
    {% if m.role == 'user' %}
<｜User｜>{{ m['content'] }}
    {% endif %}
{% endfor %}
{{ bos_token }}
{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"""
    content = json.loads((content_dir() / "base" / "tokenizer_config.json").read_text())
    settings = json.dumps(content | {"chat_template": template})
    folder = base_with(tmp_path / "theirs", tokenizer_config=settings)
    asked = [{"role": "user", "content": "why?"}]
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        asked, add_generation_prompt=True, tokenize=False
    )
    assert Chat.load(folder).render(asked, True) == theirs


def base_with(folder: Path, **files: str | None) -> Path:
    """A copy of the bundled base, without manifest, with other files (None: left out)."""
    shutil.copytree(content_dir() / "base", folder)
    (folder / "manifest.json").unlink()
    for name, text in files.items():
        path = folder / f"{name}.json"
        path.unlink() if text is None else path.write_text(text)
    return folder


def test_an_imported_checkpoint_is_a_parent(tmp_path, monkeypatch, capsys):
    theirs = base_with(tmp_path / "theirs")
    settings = json.loads((theirs / "tokenizer_config.json").read_text())
    (theirs / "chat_template.jinja").write_text(settings.pop("chat_template"))  # as newer transformers do
    (theirs / "tokenizer_config.json").write_text(json.dumps(settings))
    stage = load_stage("import_weights")
    monkeypatch.setattr(
        launch,
        "script",
        lambda name, words: stage.main(script_options.read(ImportOptions, [name, *words])) or 0,
    )
    root = tmp_path / "runs"

    def call(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["r1pipe", *words, f"root={root}", "tracking=none"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    assert call("import", str(theirs), "--name", "mine") == 0
    told = capsys.readouterr().out
    assert "1,282,456 parameters" in told and "parent=imported/mine model=laptop" in told
    assert (
        Chat.load(root / "imported" / "mine").eos_id == load_pretrained(root / "imported" / "mine").eos_ids[0]
    )
    assert call("run", "stage=cold_start", "parent=imported/mine", "--dry-run") == 0
    assert call("import", str(theirs), "--name", "mine") == 2
    assert "is there already" in capsys.readouterr().err
    assert call("import", str(theirs), "--name", "a/b") == 2
    assert call("import", str(theirs), "--name", "x", "--dtype", "int4") == 2


def test_a_shape_that_no_file_of_conf_has_is_told_as_overrides(tmp_path):
    publish(tmp_path / "theirs", dataclasses.replace(SHAPES["v3_yarn"], vocab_size=1152), "fp32")
    convert(tmp_path / "theirs", tmp_path / "ours")
    checkpoints.write_manifest(tmp_path / "ours")
    parent = lineage.checkpoint_of_folder(tmp_path / "ours")
    settings = lineage.settings_of(parent, set())
    model = compose(
        ["stage=pretrain", *settings, "stage.sequence_length=64", "stage.eval.max_tokens=64"]
    ).config.model
    lineage.fit.check_parent_fits(parent, model)
    assert model.rope_scaling == YARN
    expected = model_config_from(tmp_path / "ours")
    for key in lineage.UNLIKE:
        setattr(model, key, getattr(expected, key))
    assert model == expected
    assert lineage.settings_of(parent, {"model"}) == []


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"tokenizer": None}, "tokenizer.json is missing"),
        ({"tokenizer": "{"}, "cannot be read"),
        ({"tokenizer_config": "{}"}, "no chat_template"),
        ({"tokenizer_config": json.dumps({"chat_template": "{% if %}"})}, "no tokenizer taken"),
    ],
)
def test_without_a_usable_tokenizer_the_weights_come_in_and_a_line_says_why(files, told, tmp_path, capsys):
    stage = load_stage("import_weights")
    source = base_with(tmp_path / "theirs", **files)
    stage.main(ImportOptions(source, tmp_path / "ours", None, 5.0))
    lines = capsys.readouterr().out.splitlines()
    assert sum(told in line and "import again" in line for line in lines) == 1
    assert not any((tmp_path / "ours" / name).exists() for name in TOKENIZER_FILES)
    assert load_pretrained(tmp_path / "ours").eos_ids == load_pretrained(source).eos_ids


# --- what is refused


def set_config(folder: Path, **values) -> None:
    content = json.loads((folder / CONFIG).read_text()) | values
    (folder / CONFIG).write_text(json.dumps(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-99])


def stray(folder: Path) -> None:
    path = file_of(folder, EXPERT)
    save_file({**load_file(path), "stray": torch.zeros(2)}, path)


LOST = "model-00009-of-00009.safetensors"
WRONG = {
    "missing tensor": (lambda f: forget(f, EXPERT), [EXPERT, INDEX]),
    "missing layer norm": (lambda f: forget(f, "model.norm.weight"), ["model.norm.weight", INDEX]),
    "extra tensor": (
        lambda f: (stray(f), promise(f, "stray", file_of(f, EXPERT).name)), ["stray", "00003.safetensors"]
    ),
    "tensor that the index leaves out": (stray, ["stray", "does not list"]),
    "wrong shape": (lambda f: alter(f, "lm_head.weight", torch.zeros(2, 2)), ["lm_head.weight", "[2, 2]"]),
    "wrong dtype": (
        lambda f: alter(f, "lm_head.weight", torch.zeros(97, 160).int()), ["lm_head.weight", "I32"]
    ),
    "FP8 where no scale can be": (
        lambda f: alter(f, "model.norm.weight", torch.zeros(160).to(torch.float8_e4m3fn)),
        ["model.norm.weight", "F8_E4M3"],
    ),
    "missing scale": (lambda f: forget(f, SCALE), [EXPERT, SCALE, "is missing"]),
    "wrong scale shape": (lambda f: alter(f, SCALE, torch.zeros(1, 2)), [SCALE, "[1, 2]", "[2, 1]"]),
    "wrong scale dtype": (lambda f: alter(f, SCALE, torch.zeros(2, 1).bfloat16()), [SCALE, "BF16"]),
    "scale of no FP8 weight": (lambda f: alter(f, EXPERT, torch.zeros(160, 24)), [SCALE, "scale of no FP8"]),
    "MTP layer in part": (lambda f: forget(f, "model.layers.3.enorm.weight"), ["layers.3.enorm.weight"]),
    "MTP layer that config.json denies": (
        lambda f: set_config(f, num_nextn_predict_layers=0), ["model.layers.3", "no place"]
    ),
    "half-written shard": (lambda f: cut(file_of(f, EXPERT)), ["00003.safetensors", "cut off"]),
    "empty shard": (lambda f: file_of(f, EXPERT).write_bytes(b""), ["00003.safetensors", "damaged"]),
    "pickle": (lambda f: file_of(f, EXPERT).write_bytes(b"\x80\x04." * 50), ["00003.safetensors"]),
    "lost shard": (lambda f: file_of(f, EXPERT).unlink(), ["00003.safetensors is missing", "tensor"]),
    "index of a lost file": (lambda f: promise(f, EXPERT, LOST), [LOST, EXPERT]),
    "index outside the folder": (lambda f: promise(f, EXPERT, "../x"), [INDEX, EXPERT]),
    "index that promises too much": (lambda f: alter(f, EXPERT, None), [EXPERT, "lacks tensor", INDEX]),
    "bad index": (lambda f: (f / INDEX).write_text('{"weight_map": '), [INDEX, "not valid JSON"]),
    "empty index": (lambda f: (f / INDEX).write_text("{}"), [INDEX, "weight_map"]),
    "no weights": (lambda f: (f / INDEX).unlink(), [WEIGHTS, "is missing"]),
    "bad config": (lambda f: (f / CONFIG).write_text("{"), [CONFIG, "not valid JSON"]),
    "config of a list": (lambda f: (f / CONFIG).write_text("[]"), [CONFIG, "JSON object"]),
    "no config": (lambda f: (f / CONFIG).unlink(), [CONFIG, "is missing"]),
    "lacking key": (lambda f: (f / CONFIG).write_text("{}"), [CONFIG, "vocab_size"]),
    "key of another type": (lambda f: set_config(f, hidden_size="160"), [CONFIG, "hidden_size"]),
    "impossible shape": (lambda f: set_config(f, n_group=3), [CONFIG, "n_group"]),
    "another architecture": (lambda f: set_config(f, model_type="llama"), [CONFIG, "llama"]),
    "another quantisation": (
        lambda f: set_config(f, quantization_config={"quant_method": "gptq"}), [CONFIG, "quant_method"]
    ),
    "other blocks": (
        lambda f: set_config(f, quantization_config={"weight_block_size": [64, 64]}),
        [CONFIG, "weight_block_size"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    publish(folder, RAGGED, "fp8", mtp=1)
    return folder


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_is_one_line_that_names_tensor_and_file(kind, theirs, tmp_path):
    folder = tmp_path / "theirs"
    shutil.copytree(theirs, folder)
    load_pretrained(folder)
    damage, words = WRONG[kind]
    damage(folder)
    for refused in (lambda: load_pretrained(folder), lambda: convert(folder, tmp_path / "ours")):
        with pytest.raises(CheckpointError) as error:
            refused()
        assert "\n" not in str(error.value) and str(folder) in str(error.value)
        assert [word for word in words if word not in str(error.value)] == []
    assert not (tmp_path / "ours").exists()


def test_an_unknown_precision_and_a_bad_end_token_are_refused(theirs, tmp_path):
    with pytest.raises(ConfigError, match="float32, bfloat16, fp8"):
        convert(theirs, tmp_path / "ours", "int4")
    shutil.copytree(theirs, tmp_path / "theirs")
    (tmp_path / "theirs" / GENERATION).write_text('{"eos_token_id": "end"}')
    with pytest.raises(CheckpointError, match="eos_token_id=end"):
        load_pretrained(tmp_path / "theirs")


def test_the_command_line_says_it_in_one_line_and_leaves_nothing(theirs, tmp_path, monkeypatch, capfd):
    folder = tmp_path / "theirs"
    shutil.copytree(theirs, folder)
    cut(file_of(folder, EXPERT))
    monkeypatch.setattr("sys.argv", ["r1pipe", "import", str(folder), f"root={tmp_path}", "tracking=none"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    out, err = capfd.readouterr()
    assert (
        err.count("\n") == 1
        and err.startswith("r1pipe: ")
        and file_of(folder, EXPERT).name in err
        and not out
    )
    assert not any((tmp_path / "imported").iterdir())


def test_an_export_onto_something_is_refused(tmp_path):
    stage = load_stage("export")
    (tmp_path / "file").write_text("")
    for target in (tmp_path, tmp_path / "file"):
        with pytest.raises(CheckpointError, match="is there already"):
            stage.main(ExportOptions(content_dir() / "base", target, None, 5.0))
    for wrong in (math.nan, math.inf, 0.0):
        with pytest.raises(ConfigError, match="shard-gb"):
            script_options.write(ExportOptions(tmp_path, tmp_path / "new", None, wrong), tmp_path / "options")


def test_an_export_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    stage = load_stage("export")
    base, out = content_dir() / "base", tmp_path / "out"
    told, theirs = stage.logits, stage.logits_of_transformers
    monkeypatch.setattr(stage, "logits", lambda folder: told(folder) + (folder != base))
    with pytest.raises(CheckpointError, match="apart from those of"):
        stage.main(ExportOptions(base, out, None, 5.0))
    monkeypatch.setattr(stage, "logits", told)
    monkeypatch.setattr(stage, "logits_of_transformers", lambda folder: theirs(folder) + 1)
    with pytest.raises(CheckpointError, match="transformers computes other logits"):
        stage.main(ExportOptions(base, out, None, 5.0))
    assert not out.exists(), "nobody can take it for whole"
