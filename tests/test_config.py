"""What overrides become: every shipped file, who wins over whom, and one line for every mistake."""

import copy
import dataclasses
import functools
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from test_hf_config import publish

from r1pipe.config import (
    STAGE_TYPES,
    EvaluateConfig,
    ParentRef,
    RLConfig,
    config_hash,
    load,
    to_mapping,
)
from r1pipe.config.changes import changes
from r1pipe.config.compose import COMMAND_LINE, compose
from r1pipe.config.distill_methods import EXTRACTS
from r1pipe.config.groups import GROUPS, flat, options, read
from r1pipe.config.rules import check
from r1pipe.core.errors import ConfigError
from r1pipe.core.paths import conf_dir, stages_dir

OTHERS = [
    f"{group}={option}"
    for group in GROUPS
    if group not in ("recipe", "stage", "benchmark")  # test_benchmarks.py
    for option in options(group)
]
OTHERS.remove("model=hf")  # needs a folder: test_hf_config.py
OTHERS.append("stage=evaluate")  # the other stages are walked by the recipes below
WALKS = [
    (recipe, stage)
    for recipe in options("recipe")
    for stage in (*read(f"recipe/{recipe}")["stages"], *read(f"recipe/{recipe}")["controls"])
]


@pytest.mark.parametrize("choice", OTHERS)
def test_every_shipped_file_composes(choice: str) -> None:
    config = compose([choice, "parent=any"]).config
    group, _, option = choice.partition("=")
    chosen = to_mapping(config)[group]
    assert chosen.get("name", option) == option


@pytest.mark.parametrize(("recipe", "stage"), WALKS)
def test_every_stage_of_every_recipe_composes(recipe: str, stage: str, tmp_path: Path) -> None:
    is_hf = read(f"recipe/{recipe}")["choose"]["model"] == "hf"
    words = [f"model.path={publish(tmp_path / 'model')}"] if is_hf else []
    config = compose([f"recipe={recipe}", f"stage={stage}", *words]).config
    assert config.stage.name == stage and config.pipeline == f"{recipe}-s0"
    assert isinstance(config.stage, STAGE_TYPES[stage])


def test_every_stage_is_walked_by_some_recipe() -> None:
    assert {stage for _, stage in WALKS} | {"evaluate"} == set(options("stage"))


def test_recipes_give_values_to_known_stages_only() -> None:
    transfers = [f"distill/{name}" for name in options("stage/part/transfer")]
    known = {*options("stage"), *transfers, *(f"{name}/{each}" for name in transfers for each in EXTRACTS)}
    for recipe in options("recipe"):
        assert set(read(f"recipe/{recipe}")["stage_values"]) <= known


def test_every_stage_has_its_script() -> None:
    scripts = {read(f"stage/{stage}")["script"] for stage in options("stage")}
    assert scripts <= {path.name for path in stages_dir().glob("*.py")}


def test_edges_of_the_graph() -> None:
    edges = {
        stage: (read(f"stage/{stage}")["starts_from"], read(f"stage/{stage}")["reads"])
        for stage in options("stage")
    }
    assert edges["rejection_sft"] == ("base", ["grpo"]), (
        "weights from the base again, data from reinforcement"
    )
    assert edges["all_scenario"] == ("rejection_sft", ["reward_model"])
    assert edges["distill"] == ("base", ["rejection_sft"])
    assert edges["zero"] == edges["control_sft"] == edges["cold_start"] == ("base", [])


def test_cluster_is_the_paper() -> None:
    stage = compose(["recipe=cluster", "stage=grpo"]).config.stage
    assert isinstance(stage, RLConfig)
    outputs = stage.prompts_per_step * stage.group_size
    assert (outputs, outputs // stage.minibatches, stage.group_size) == (8192, 512, 16)
    assert stage.reference_every * stage.minibatches == 400
    assert (stage.optim.lr, stage.kl_coef, stage.clip) == (3e-6, 0.001, 10.0)
    assert (stage.sampling.temperature, stage.sampling.max_tokens) == (1.0, 32768)


@pytest.mark.parametrize(
    ("recipe", "stage"),
    [*(walk for walk in WALKS if walk[0] in ("gpu", "cluster")), ("gpu", "distill"), ("cluster", "distill")],
)
def test_where_a_stage_takes_long_a_lost_machine_costs_some_of_it(recipe: str, stage: str) -> None:
    config = compose([f"recipe={recipe}", f"stage={stage}", "parent=any"]).config
    trains = STAGE_TYPES[stage] is not EvaluateConfig
    assert (config.stage.save_every > 0) == trains


def test_the_command_line_wins_over_the_recipe_and_the_recipe_over_the_stage() -> None:
    key = "stage.optim.lr"
    paper, laptop, mine = (
        compose(["stage=grpo", *words])
        for words in (["recipe=cluster"], ["recipe=laptop"], ["recipe=laptop", f"{key}=0.5"])
    )
    rates = [found.config.stage.optim.lr for found in (paper, laptop, mine)]
    assert rates == [3e-6, 3e-4, 0.5]
    sources = [found.sources[key] for found in (paper, laptop, mine)]
    assert sources == ["conf/stage/part/rl.yaml", "conf/recipe/laptop.yaml", COMMAND_LINE]


def test_a_composition_leaves_the_next_one_as_it_was() -> None:
    plain = to_mapping(compose(["stage=grpo"]).config)
    words = ["stage.sampling.max_tokens=7", "stage.rewards.weights={format: 3.0}", "data.tasks=[word]"]
    assert to_mapping(compose(["stage=grpo", *words]).config) != plain
    assert to_mapping(compose(["stage=grpo"]).config) == plain


@pytest.mark.parametrize("key", ["precision", "engine.precision"])
def test_a_low_precision_brings_the_zero_level_that_keeps_masters(key: str) -> None:
    chosen = compose([f"{key}=bf16", "engine=cpu"])
    assert (chosen.config.engine.precision, chosen.config.engine.zero_level) == ("bf16", 1)
    assert chosen.sources["engine.zero_level"] == COMMAND_LINE
    assert compose(["engine.zero_level=2", f"{key}=bf16"]).config.engine.zero_level == 2
    assert compose([f"{key}=fp32"]).config.engine.zero_level == 0
    with pytest.raises(ConfigError, match="needs engine"):
        compose([f"{key}=bf16", "engine.zero_level=0"])


def test_a_group_on_the_command_line_wins_over_the_recipes_choice_wherever_it_stands() -> None:
    for words in (["model=small", "recipe=gpu", "engine=cpu"], ["engine=cpu", "recipe=gpu", "model=small"]):
        config = compose(words).config
        assert (config.model.name, config.engine.name, config.recipe.name) == ("small", "cpu", "gpu")


def test_every_value_has_a_source_that_says_so() -> None:
    found = compose(["stage=all_scenario", "recipe=gpu", "seed=3"])
    values = dict(flat(to_mapping(found.config)))
    assert set(found.sources) == set(values) - {"weights_from", "reads_from", "teacher_from", "judge_from"}
    for key, source in found.sources.items():
        if source != COMMAND_LINE:
            name = key.rpartition(".")[2]
            assert f"{name}:" in (conf_dir().parent / source).read_text(), f"{key} is not in {source}"
    assert found.sources["seed"] == COMMAND_LINE


def test_json_and_back_is_the_same_config() -> None:
    config = compose(["stage=rejection_sft"]).config
    filled = dataclasses.replace(config, weights_from=ParentRef("base", "bundled", "/base", "ab"))
    again = load(json.loads(json.dumps(to_mapping(filled))))
    assert again == filled and config_hash(again) == config_hash(filled)


def test_the_hash_follows_what_is_computed_and_nothing_else() -> None:
    config = compose(["stage=cold_start"]).config
    parent = ParentRef("base", "base-1", "/here/base", "ab")
    first = config_hash(dataclasses.replace(config, weights_from=parent))
    moved = dataclasses.replace(parent, run_id="base-2", checkpoint="/there")
    same = dataclasses.replace(config, root="/elsewhere", weights_from=moved)
    assert config_hash(same) == first
    assert (
        config_hash(dataclasses.replace(config, weights_from=dataclasses.replace(parent, hash="cd"))) != first
    )
    assert config_hash(compose(["stage=cold_start", "seed=1"]).config) != config_hash(config)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("stage=grppo", "did you mean grpo?"),
        ("model=lptop", "did you mean laptop?"),
        ("recipe=laptob", "did you mean laptop?"),
        ("stage.max_step=3", "stage.max_step is no key of the config; did you mean stage.max_steps?"),
        ("stage.lr=3", "did you mean stage.optim.lr?"),
        ("stag.max_steps=3", "did you mean stage.max_steps?"),
        ("+stage.maxsteps=3", "did you mean max_steps?"),
        ("stage.rewards.weights.acuracy=1", "did you mean accuracy?"),
        ("stage.rewards.weights.lenght=1", "nor installed; known: accuracy, calculation,"),
        ("stage.reward.weights.acuracy=1", "did you mean stage.rewards?"),
        ("hydra.run.dir=x", "hydra.run.dir is no key of the config"),
        ("+weights_from=x", "weights_from is no key of the config"),
        ("stage.max_steps=many", "stage.max_steps=many is text, but must be a whole number"),
        ("stage.max_steps=1.5", "stage.max_steps=1.5 is a number, but must be a whole number"),
        ("stage.max_steps=true", "is true or false, but must be a whole number"),
        ("stage.max_steps=-1", "stage.max_steps=-1 must be 0 or more"),
        ("stage.eval.greedy=1", "must be true or false"),
        ("stage.optim.betas=0.9", "must be a list"),
        ("stage.optim.betas=[0.9,x]", "stage.optim.betas[1]=x is text"),
        ("stage.micro_tokens=3", "it is now stage.max_tokens_per_micro_batch"),
        ("stage.rewards.unfinished=-1", "it is now stage.rewards.truncation_penalty"),
        ("stage.surrogate=weighted", "stage.surrogate=weighted is now stage.surrogate=cispo"),
        ("stage.optim=3", "stage.optim=3 is not a group of values"),
        ("stage.optim.lr=inf", "is not finite"),
        ("~stage.max_steps", "stage.max_steps is missing"),
        ("~stage", "no such stage"),
        ("seed", "is no override"),
        ("seed=[(", "cannot read seed=[(: "),
        ("root=a,b", "gives several values"),
        ("root=${rot}", "rot"),
        ("stage=evaluate", "needs parent=CHECKPOINT"),
        ("stage=pretrain stage.max_steps=0", "the corpus is endless"),
        ("stage=pretrain data=gsm8k", "data=gsm8k has no documents for stage=pretrain; use data=world"),
    ],
)
def test_a_mistake_is_one_line_that_names_key_and_remedy(words: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(words.split())
    assert told in str(caught.value) and "\n" not in str(caught.value)


@cache
def valid(stage: str) -> dict[str, Any]:
    return to_mapping(compose([f"stage={stage}"]).config)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("model.num_experts_per_tok=9", "model.num_experts_per_tok=9 is more than the 8 experts"),
        ("model.n_group=3", "model.n_group=3 must divide"),
        ("model.topk_group=5", "model.topk_group=5 is more than"),
        ("model.qk_rope_head_dim=15", "model.qk_rope_head_dim=15 must be even"),
        ("model.n_group=8", "model.n_group=8 leaves one expert per group"),
        ("model.num_attention_heads=0", "model.num_attention_heads=0 must be 1 or more"),
        (
            "model.scoring_func=softmax",
            "model.scoring_func=softmax does not go with model.topk_method=noaux_tc",
        ),
        ("model.topk_method=best", "model.topk_method=best is none of"),
        ("engine.ranks=7", "must be a multiple of the 7 ranks"),
        ("engine.zero_level=4", "engine.zero_level=4 is none of 0, 1, 2, 3"),
        ("engine.precision=bf16", "needs engine.zero_level=1"),
        ("engine.launcher=pdsh", "needs engine.hostfile"),
        ("engine.launcher=slurm", "choose engine=slurm"),
        ("stage.minibatches=7", "must divide evenly into stage.minibatches=7"),
        ("stage.group_size=1", "give 2 or more"),
        ("stage.trained_per_group=1", "must be at least 2 and at most stage.group_size=8"),
        ("stage.sampling.max_tokens=4096", "is longer than model.max_position_embeddings"),
        ("stage.sampling.top_p=0.9", "stage.sampling.top_p=0.9: reinforcement learns from the whole"),
        ("stage=all_scenario stage.sampling.top_p=0.5", "it must be 1"),
        ("stage.loss_aggregation=mean", "is none of sequence, token"),
        ('stage.rewards.weights={"accuracy":0}', "nothing would be learned"),
        ("stage.optim.min_lr=1", "is above stage.optim.lr"),
        (
            'stage.rewards.weights={"acuracy":1}',
            "weights.acuracy is no rule reward, nor one of stage.rewards.plugins",
        ),
        ('stage.rewards.weights={"helpful":1}', "preference.helpful_weight in stage=all_scenario"),
        (
            'stage=all_scenario stage.rewards.weights={"helpful":1}',
            "is stage.preference.helpful_weight; ",
        ),
        (
            'stage.rewards.weights={"kl":3}',
            "no rule reward; its weight is stage.kl_coef; rules: accuracy",
        ),
        ("stage=cold_start stage.sequence_length=4096", "stage.sequence_length=4096 is longer"),
        ("stage=cold_start stage.batch_size=7", "stage.batch_size=7 must be a multiple of engine.ranks=2"),
        ("stage=all_scenario stage.preference.last_steps=99", "is more than stage.max_steps"),
        ("stage=all_scenario stage.preference.min_accuracy=1.5", "must be from 0 to 1"),
        ("stage=all_scenario stage.preference.max_length_correlation=2", "must be from 0 to 1"),
        ("chat.system=<｜User｜>", "chat.system has the sign <｜ of a special token"),
    ],
)
def test_what_cannot_be_together_is_refused_by_key(change: str, told: str) -> None:
    """`change` is [stage=NAME] KEY=JSON, put into a valid config without Hydra: that is quicker."""
    *stage, assignment = change.split()
    mapping = copy.deepcopy(valid(stage[0].removeprefix("stage=") if stage else "grpo"))
    key, _, value = assignment.partition("=")
    *path, last = key.split(".")
    place = functools.reduce(dict.__getitem__, path, mapping)
    place[last] = json.loads(value) if value[0] in "{0123456789" else value
    with pytest.raises(ConfigError) as caught:
        check(load(mapping))
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_system_prompt_has_commas_in_quotes_and_a_null_that_an_older_run_lacks_is_no_change() -> None:
    config = compose(["stage=grpo", "chat.system='Think, then answer.'"]).config
    assert config.chat.system == "Think, then answer."
    assert compose(["stage=grpo", "chat.system="]).config.chat.system == ""
    with pytest.raises(ConfigError, match=r"chat\.system is blank"):
        compose(["stage=grpo", "chat.system='  '"])
    new = to_mapping(compose(["stage=grpo"]).config)
    old = {key: value for key, value in new.items() if key != "chat"}
    assert new["chat"] == {"system": None} and changes(old, new) == []
    assert [change.key for change in changes(old, to_mapping(config))] == ["chat.system"]


def test_rejection_sampling_may_cut_to_a_nucleus() -> None:
    assert compose(["stage=rejection_sft", "stage.sampling.top_p=0.9"]).config.stage.sampling.top_p == 0.9


def test_zero_is_a_number_of_steps() -> None:
    assert compose(["stage=cold_start", "stage.max_steps=0"]).config.stage.max_steps == 0


def test_a_broken_config_json_names_file_and_line(tmp_path: Path) -> None:
    from r1pipe.config import read_config

    (tmp_path / "config.json").write_text('{"seed": 0,\n "root" }')
    with pytest.raises(ConfigError, match=r"config\.json:2 is not JSON"):
        read_config(tmp_path / "config.json")


def test_a_recipes_styles_are_for_its_own_data_and_those_given_replace_them() -> None:
    own = compose(["stage=cold_start"]).config.stage.styles
    assert set(own) == {"careful", "terse", "guess", "thorough"}
    assert compose(["stage=cold_start", "stage.styles={careful: 1.0}"]).config.stage.styles == {"careful": 1}
    one = compose(["stage=cold_start", "stage.styles.guess=0.1"]).config.stage.styles
    assert one == own | {"guess": 0.1}
    for stage in ("cold_start", "control_sft"):
        assert compose([f"stage={stage}", "data=gsm8k", "data.path=a.jsonl"]).config.stage.styles == {}
