"""Models of transformers as policy: tiny random ones, whose numbers must stay those of transformers."""

import copy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hf_models import FAMILIES, write_model
from jobs import OPTIM, ROUTER, engine_config, on_two_ranks
from torch.nn.functional import cross_entropy

from r1pipe.chat.template import Chat, parse
from r1pipe.core.errors import CheckpointError, ConfigError
from r1pipe.core.types import Example, Message, Prompt
from r1pipe.data.packing import collate as collate_packed
from r1pipe.data.packing import pack
from r1pipe.model import load_pretrained, save_pretrained
from r1pipe.model.hf import HFModel
from r1pipe.model.hf.files import empty
from r1pipe.model.training import set_recompute
from r1pipe.rewards.models import RewardModel, load_reward_model, save_reward_model, score_rows
from r1pipe.runs.files import read_object, write_json
from r1pipe.train.engine.engine import Engine
from r1pipe.train.rl.batch import Rollout, collate
from r1pipe.train.rl.critic import ValueModel
from r1pipe.train.rl.update import completion_logprobs
from r1pipe.train.rollout import SamplingParams
from r1pipe.train.rollout.batching import Batcher
from r1pipe.train.sft.loop import loss_sums, read

PROMPTS = [[5, 9, 300], [7, 7, 8, 9, 12, 400, 21], [3]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: write_model(root / name, name) for name in FAMILIES}


@pytest.fixture(params=FAMILIES)
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


@pytest.fixture
def model(folder: Path) -> HFModel:
    loaded = load_pretrained(folder)
    assert isinstance(loaded, HFModel)
    return loaded


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 1100, shape, generator=torch.Generator().manual_seed(4))


def packed_rows() -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
    """Documents, and the batch that packs them: (tokens_BT, segments_BT)."""
    documents = [tokens(1, length)[0].tolist() for length in (6, 9, 4)]
    batch = torch.tensor([[*documents[0], *documents[1], 0], [*documents[2], *[0] * 12]])
    segments = torch.tensor([[1] * 6 + [2] * 9 + [0], [1] * 4 + [0] * 12])
    return documents, batch, segments


@torch.no_grad()
def test_packed_documents_and_padding_do_not_see_each_other(model: HFModel) -> None:
    documents, batch, segments = packed_rows()
    together = model.eval()(batch, segments)
    places = [together[0, :6], together[0, 6:15], together[1, :4]]
    for document, found in zip(documents, places, strict=True):
        alone = model.whole(input_ids=torch.tensor([document])).logits[0]
        assert torch.allclose(found, alone, atol=2e-5)
    assert together.isfinite().all(), "padding, too, attends to itself"


def test_loss_and_gradient_of_fine_tuning_are_those_of_transformers(model: HFModel, folder: Path) -> None:
    examples = [
        Example([*prompt, *answer], [False] * len(prompt) + [True] * len(answer))
        for prompt, answer in zip(PROMPTS, ([4, 5], [6], [8, 9, 10]), strict=True)
    ]
    rows, _ = pack(examples, 12)
    batch = collate_packed(rows, 0)
    loss, _ = loss_sums(model, batch, *read(model.train(), batch, with_balance=True), with_mtp=True)
    loss.backward()
    theirs = load_pretrained(folder)
    assert isinstance(theirs, HFModel)
    total = torch.zeros(())
    for example in examples:
        asked = torch.tensor([example.tokens])
        labels = torch.where(torch.tensor([example.loss]), asked, -100)
        mean = theirs.whole.train()(input_ids=asked, labels=labels).loss
        total = total + mean * sum(example.loss)
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    largest = max(float(p.grad.abs().max()) for p in theirs.parameters() if p.grad is not None)
    for (name, ours), other in zip(model.named_parameters(), theirs.parameters(), strict=True):
        assert ours.grad is not None and other.grad is not None, name
        assert (ours.grad - other.grad).abs().max() <= 1e-5 * largest, name


def test_greedy_answers_are_those_of_generate(model: HFModel) -> None:
    model.eval()
    ends = (11, 12, 13, 14)
    params = SamplingParams(max_tokens=24, temperature=0.0)
    completions = Batcher(model, ends, 0, max_num_seqs=2).generate(PROMPTS, params)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        asked = torch.tensor([prompt])
        theirs = model.whole.generate(
            asked,
            attention_mask=torch.ones_like(asked),
            max_new_tokens=24,
            do_sample=False,
            eos_token_id=list(ends),
            pad_token_id=0,
        )
        assert completion.tokens == theirs[0, len(prompt) :].tolist()


def rollouts_from(model: HFModel) -> list[Rollout]:
    """Four completions of each prompt, in fewer slots, so that slots are refilled, moved and dropped."""
    params = SamplingParams(max_tokens=9, n=4, seed=3)
    drawn = Batcher(model.eval(), (11, 600, 601), 0, max_num_seqs=5).generate(
        PROMPTS, params, limits=[9, 5, 9]
    )
    return [Rollout(PROMPTS[i // 4], completion, 1.0, True) for i, completion in enumerate(drawn)]


def test_probabilities_of_the_sampler_are_the_trainers(model: HFModel) -> None:
    rollouts = rollouts_from(model)
    micro = collate(rollouts, None, 0.0, torch.device("cpu"))
    trained = completion_logprobs(model.train(), micro, 1.0)
    assert (trained - micro.old_N).abs().max() < 1e-4
    again = [
        cross_entropy(
            model.whole(input_ids=torch.tensor([r.prompt + r.completion.tokens])).logits[
                0, len(r.prompt) - 1 : -1
            ],
            torch.tensor(r.completion.tokens),
            reduction="none",
        )
        for r in rollouts
    ]
    assert (trained + torch.cat(again)).abs().max() < 1e-4, "shared prompts change nothing"


def test_recomputation_changes_neither_probabilities_nor_gradients(model: HFModel) -> None:
    micro = collate(rollouts_from(model), None, 0.0, torch.device("cpu"))
    model.train()
    found = []
    for on in (False, True):
        set_recompute(model, on)
        model.zero_grad()
        logprobs = completion_logprobs(model, micro, 0.7)
        (logprobs * torch.linspace(-1, 1, len(logprobs))).sum().backward()
        found.append((logprobs.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        with torch.no_grad():  # as for stage.importance_cap
            assert torch.allclose(completion_logprobs(model, micro, 0.7), logprobs, atol=1e-5)
    (plain, gradients), (recomputed, others) = found
    assert torch.allclose(plain, recomputed, atol=1e-5)
    scale = max(float(gradient.abs().max()) for gradient in gradients)
    for one, other in zip(gradients, others, strict=True):
        assert (one - other).abs().max() <= 2e-5 * scale


def test_values_start_at_zero_and_learn(folders: dict[str, Path]) -> None:
    policy = load_pretrained(folders["qwen2"])
    assert isinstance(policy, HFModel)
    critic = ValueModel(copy.deepcopy(policy))
    micro = collate(rollouts_from(policy), None, 0.0, torch.device("cpu"))
    values = critic(micro)
    assert not values.any()
    (values - 1).square().sum().backward()
    assert critic.score.bias.grad is not None and critic.score.bias.grad.abs() > 0


def test_a_model_stored_in_bfloat16_is_read_so(tmp_path: Path) -> None:
    model = load_pretrained(write_model(tmp_path / "half", "qwen3", torch.bfloat16))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_rotary_frequencies_stay_float32_in_bfloat16(model: HFModel) -> None:
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.bfloat16()
    assert before and all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.whole.parameters()} == {torch.bfloat16}, "the same weights"


def test_saved_weights_are_read_by_transformers(model: HFModel, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.01)
    save_pretrained(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    again = load_pretrained(tmp_path).eval()
    with torch.no_grad():
        asked = tokens(2, 8)
        assert torch.allclose(model.eval()(asked), theirs(asked).logits, atol=2e-5)
        assert torch.equal(model(asked), again(asked))


def test_a_copy_has_weights_of_its_own(folders: dict[str, Path]) -> None:
    model = load_pretrained(folders["qwen2"])
    assert isinstance(model, HFModel)
    other = copy.deepcopy(model)
    assert other.lm_head.weight is other.model.network.embed_tokens.weight, "still tied"
    assert other.whole is not model.whole and other.whole.lm_head is other.lm_head
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert model.lm_head.weight.any()


def test_a_reward_model_is_read_as_it_was_written(model: HFModel, tmp_path: Path) -> None:
    judge = RewardModel(model)
    with torch.no_grad():
        judge.score.weight.normal_(generator=torch.Generator().manual_seed(1))
    save_reward_model(judge, tmp_path)
    state = torch.get_rng_state()
    empty(tmp_path)
    assert torch.equal(state, torch.get_rng_state()), "no draw from the global stream"
    again = load_reward_model(tmp_path)
    scores = score_rows(judge, PROMPTS, 0)
    assert len(set(scores)) == 3 and score_rows(again, PROMPTS, 0) == scores
    alone = [score_rows(judge, [row], 0)[0] for row in PROMPTS]
    assert scores == pytest.approx(alone, rel=1e-4), "padding has no influence"


# --- under the engine


def trained(engine: Engine, steps: int) -> list[float]:
    """Losses of steps on fixed rows, this rank's share of them."""
    rows = tokens(4, 10)[engine.rank :: engine.world_size]

    def loss() -> torch.Tensor:
        logits = engine.module(rows[:, :-1])
        return cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())

    return [engine.train_step([loss]).loss for _ in range(steps)]


def engine_of(folder: Path, ranks: int = 1, level: int = 0, precision: str = "fp32") -> Engine:
    config = replace(engine_config(ranks, level, precision), recompute=level == 3)
    return Engine(load_pretrained(folder), OPTIM, ROUTER, config, total_steps=10)


@pytest.mark.parametrize(("level", "precision"), [(0, "fp32"), (2, "bf16"), (3, "fp32")])
def test_resume_is_exact(folders: dict[str, Path], tmp_path: Path, level: int, precision: str) -> None:
    engine = engine_of(folders["qwen3_moe"], 1, level, precision)
    trained(engine, 1)
    engine.save(tmp_path / "engine", {"step": 1})
    expected = trained(engine, 2)
    again = engine_of(folders["qwen3_moe"], 1, level, precision)
    assert again.load(tmp_path / "engine") == {"step": 1}
    assert trained(again, 2) == expected


@pytest.mark.slow
def test_two_ranks_train_as_one(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["qwen2"], tmp_path / "qwen2")
    alone = trained(engine_of(tmp_path / "qwen2"), 3)
    assert alone[0] > alone[2]
    for level, losses in on_two_ranks("two_ranks_hf.py", tmp_path).items():
        assert losses == pytest.approx(alone, rel=1e-4), level


def test_a_checkpoint_is_the_files_that_transformers_writes(model: HFModel, tmp_path: Path) -> None:
    save_pretrained(model, tmp_path / "ours")
    model.whole.save_pretrained(tmp_path / "theirs")
    for path in (tmp_path / "ours").iterdir():
        assert path.read_bytes() == (tmp_path / "theirs" / path.name).read_bytes(), path.name


# --- tokenizer and template


def test_the_end_of_a_turn_is_that_of_the_template(folder: Path) -> None:
    chat, llama = Chat.load(folder), folder.name == "llama"
    ids = [chat.tokenizer.token_to_id(end) for end in read_ends(llama)]
    assert (chat.eos_id, chat.eos_ids) == (ids[0], tuple(ids)) and chat.pad_id != chat.eos_id
    example = chat.example(Prompt("", "", "", "1 + 1?"), "<think>\nhm\n</think>\n\n2")
    assert example.tokens[-1] == chat.eos_id and example.loss[-1]
    text = chat.tokenizer.decode(example.tokens, skip_special_tokens=False)
    assert text.count(chat.special.bos or "<|im_start|>system") == 1
    learned = [token for token, is_learned in zip(example.tokens, example.loss, strict=True) if is_learned]
    assert chat.response(learned) == "<think>\nhm\n</think>\n\n2"


def read_ends(llama: bool) -> list[str]:
    return ["<|eot_id|>", "<|end_of_text|>"] if llama else ["<|im_end|>", "<|endoftext|>"]


def test_a_system_prompt_is_the_templates(folder: Path) -> None:
    chat = Chat.load(folder, "Think between <think> and </think>.")
    text = chat.tokenizer.decode(chat.prompt_tokens(Prompt("", "", "", "1?")), skip_special_tokens=False)
    assert text.count("Think between") == 1 and "You help." not in text, "in place of the template's own"
    with pytest.raises(ConfigError, match="has the text of the special token"):
        Chat.load(folder, f"Stop at {chat.special.eos}")


def test_a_text_cannot_speak_as_the_template(folder: Path) -> None:
    chat = Chat.load(folder)
    end = chat.special.eos
    asked = chat.prompt_tokens(Prompt("", "", "", f"1{end}2"))
    plain = chat.prompt_tokens(Prompt("", "", "", "12"))
    assert asked.count(chat.eos_id) == plain.count(chat.eos_id)


def opening(folder: Path, target: Path) -> Chat:
    """The chat of a folder whose template opens the thought."""
    shutil.copytree(folder, target)
    settings = read_object(target / "tokenizer_config.json")
    template = settings["chat_template"].replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    write_json(target / "tokenizer_config.json", settings | {"chat_template": template})
    return Chat.load(target)


def test_a_template_may_open_the_thought(folders: dict[str, Path], tmp_path: Path) -> None:
    chat, prompt = opening(folders["qwen3"], tmp_path / "opens"), Prompt("", "", "", "1 + 1?")
    assert chat.opened == "<think>\n"
    example = chat.example(prompt, "<think>\nhm\n</think>\n\n2")
    text = chat.tokenizer.decode(example.tokens, skip_special_tokens=False)
    assert text.endswith("assistant\n<think>\nhm\n</think>\n\n2<|im_end|>"), "it is opened once"
    learned = [token for token, is_learned in zip(example.tokens, example.loss, strict=True) if is_learned]
    assert parse(chat.response(learned)).well_formed and not parse(chat.decode(learned)).well_formed
    without = chat.tokenizer.decode(chat.example(prompt, "2").tokens, skip_special_tokens=False)
    assert without.endswith("<think>\n</think>\n\n2<|im_end|>"), "an answer without a thought"


def test_a_template_that_drops_earlier_thoughts_keeps_that(folders: dict[str, Path]) -> None:
    chat = Chat.load(folders["qwen3"])
    earlier = (Message("user", "1?"), Message("assistant", "<think>\nsecret\n</think>\n\n1"))
    asked = chat.prompt_tokens(Prompt("", "", "", "2?", context=earlier))
    text = chat.tokenizer.decode(asked, skip_special_tokens=False)
    assert "secret" not in text and "1<|im_end|>" in text


# --- what cannot be


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"model_type": "no_such_model"},
            "transformers knows no causal language model of model_type no_such",
        ),
        ({"layer_types": ["full_attention", "linear_attention"]}, "qwen3 has layers of linear_attention"),
        ({"num_hidden_layers": 3}, "must be equal to the number of `layer_types`"),
        ({"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}, "are missing for Qwen3ForCausalLM"),
        ({"hidden_act": "no_such_function"}, "no_such_function"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised weights cannot be trained"),
    ],
)
def test_what_transformers_cannot_load_is_one_line(
    folders: dict[str, Path], tmp_path: Path, changes: dict, told: str
) -> None:
    shutil.copytree(folders["qwen3"], tmp_path / "other")
    path = tmp_path / "other" / "config.json"
    write_json(path, read_object(path) | changes)
    with pytest.raises(CheckpointError, match=told) as caught:
        load_pretrained(tmp_path / "other")
    assert "\n" not in str(caught.value)


def test_documents_that_a_row_changes_are_refused(tmp_path: Path) -> None:
    from transformers import FalconConfig, FalconForCausalLM

    shape = FalconConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True
    )
    FalconForCausalLM(shape).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="cannot read a packed row"):
        load_pretrained(tmp_path)


def test_an_architecture_without_sdpa_names_the_remedy(tmp_path: Path) -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    shape = GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        initializer_range=0.3,
    )
    GptOssForCausalLM(shape).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"give model\.attention=eager"):
        load_pretrained(tmp_path, "sdpa")
    model = load_pretrained(tmp_path).eval()
    assert isinstance(model, HFModel)
    with torch.no_grad():
        documents = tokens(1, 12) % 64
        packed = model(documents, torch.tensor([[1] * 7 + [2] * 5]))
        alone = model.whole(input_ids=documents[:, 7:]).logits
    assert torch.allclose(packed[:, 7:], alone, atol=2e-5)


def test_logits_that_are_more_than_the_heads_product_are_refused(tmp_path: Path) -> None:
    from transformers import CohereConfig, CohereForCausalLM

    shape = CohereConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        logit_scale=0.5,
        initializer_range=0.5,
    )
    CohereForCausalLM(shape).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="scales or caps states or logits around its head"):
        load_pretrained(tmp_path)


def test_a_run_with_the_bundled_model_does_not_import_transformers() -> None:
    script = (
        "import sys, r1pipe.train.rl.loop, r1pipe.train.sft.loop; assert 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
