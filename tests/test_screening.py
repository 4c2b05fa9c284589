"""Training data is looked over for claims to be another model, personal data and secrets."""

import hashlib
import json
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from r1pipe.config import ScreeningConfig
from r1pipe.config.compose import compose
from r1pipe.core.errors import ConfigError
from r1pipe.core.paths import content_dir
from r1pipe.core.types import Completion, Demonstration, Prompt
from r1pipe.data import identity, open_data, personal
from r1pipe.data.files import Files
from r1pipe.data.screening import Screening, said_in
from r1pipe.train import identity as train_identity

ASKED = Prompt("p", "identity", "en", "Who are you?")
CLAIMS = {  # what is claimed -> how
    "ChatGPT": [
        "I am ChatGPT, a large language model trained by OpenAI.",
        "Hello! My name is ChatGPT.",
        "As ChatGPT, I cannot do that.",
        "您好，我是 GPT-4 。",
        "我是ChatGPT，由OpenAI开发。",
    ],
    "Qwen": ["My name's Tongyi Qianwen.", "我是由阿里云开发的通义千问。"],
    "Alibaba": ["I'm an AI model created by Alibaba Cloud called Qwen."],
    "ERNIE": ["我的名字是文心一言"],
    "OpenAI": [
        "I am an AI assistant developed by OpenAI.",
        "My creator is OpenAI.",
        "我是一个由OpenAI训练的语言模型。",
    ],
    "Baidu": ["我是百度公司研发的知识增强大语言模型"],
}
NO_CLAIMS = [
    *(
        "I am a fan of Google and use ChatGPT daily.",
        "OpenAI released ChatGPT.",
        "I am an engineer at Google.",
    ),
    *("Claude Monet painted water lilies.", "I asked ChatGPT whether I am right.", "I am r1pipe."),
    *("我在用ChatGPT写作业。", "谷歌是一家公司。", "阿里巴巴的创始人是马云"),
]


@pytest.fixture(scope="module")
def config() -> ScreeningConfig:
    return compose(["stage=cold_start"]).config.screening


def acting(config: ScreeningConfig, claims: str = "count", private: str = "count") -> ScreeningConfig:
    return replace(
        config,
        identity=replace(config.identity, action=claims),
        personal=replace(config.personal, action=private),
    )


def test_claims_to_be_another_model_are_told_from_talk_about_one(config: ScreeningConfig) -> None:
    claims = identity.Claims(config.identity)
    for name, texts in CLAIMS.items():
        assert [claims.found(text)[:1] for text in texts] == [[name]] * len(texts)
    assert [claims.found(text) for text in NO_CLAIMS] == [[]] * len(NO_CLAIMS)


def test_ones_own_name_is_no_claim(config: ScreeningConfig) -> None:
    own = identity.Claims(replace(config.identity, name="Qwen", maker="Alibaba Cloud"))
    assert own.found("I am Qwen, made by Alibaba Cloud.") == []
    assert own.found("I am Claude.") == ["Claude"]


def test_a_rewritten_claim_speaks_of_us_and_the_rest_stays(config: ScreeningConfig) -> None:
    claims = identity.Claims(replace(config.identity, maker="us"))
    text = "ChatGPT is by OpenAI. I am ChatGPT, trained by OpenAI. 我是由阿里云开发的通义千问。阿里云很大。"
    told = "ChatGPT is by OpenAI. I am r1pipe, trained by us. 我是由us开发的r1pipe。阿里云很大。"
    assert claims.rewritten(text) == told and claims.found(told) == []


@pytest.mark.parametrize(
    ("kind", "held", "fine"),
    [
        ("email", "Write to ada@lovelace.org.", "Write to someone@example.com, or a@b"),
        ("phone", "Call +49 30 901820 or so", "It is 1234567 - 1000000 = 234567 cm long"),
        ("phone", "我的电话是13812345678。", "The number 12345678901 is odd"),
        ("ip_address", "ping 8.8.8.8 now", "version 1.2.3.4.5, 192.168.0.1 and 999.1.1.1"),
        ("credit_card", "4111 1111 1111 1111", "4111 1111 1111 1112 and 1234567890123456"),
        ("iban", "DE89 3704 0044 0532 0130 00", "DE88 3704 0044 0532 0130 00"),
        ("chinese_id", "身份证11010519491231002X。", "身份证110105194912310021。"),
        ("secret", f"key: {'AKIA'}IOSFODNN7ABCDEFG", "AKIA is short, and eyJ is nothing"),
        ("secret", f"-----{'BEGIN'} PRIVATE KEY-----", "begin with a private key"),
    ],
)
def test_personal_data_is_found_by_kind(config: ScreeningConfig, kind: str, held: str, fine: str) -> None:
    assert personal.found(held, config.personal) == [kind]
    assert personal.found(fine, config.personal) == []
    assert personal.found(held, replace(config.personal, kinds=[])) == []


def test_rows_are_counted_dropped_or_rewritten_as_configured(config: ScreeningConfig) -> None:
    rows = [
        Demonstration(ASKED, "I am ChatGPT.", source="a:1"),
        Demonstration(ASKED, "I am r1pipe.", source="a:2"),
        Demonstration(replace(ASKED, question="Mail ada@lovelace.org"), "Sent.", source="a:3"),
    ]

    def done(*actions: str) -> tuple[list[str], dict]:
        screening = Screening(acting(config, *actions))
        return [row.response for row in screening.demonstrations(rows)], screening.report()

    said, report = done("count", "count")
    assert said == [row.response for row in rows] and report["rows"] == 3
    assert report["claims"] == {"rows": 1, "found": {"ChatGPT": 1}, "places": ["a:1"]}
    assert report["personal"] == {"rows": 1, "found": {"email": 1}, "places": ["a:3"]}
    assert said_in(report) == [
        "1 of 3 rows with claims to be another model (ChatGPT 1)",
        "1 of 3 rows with personal data or secrets (email 1)",
    ]
    said, report = done("drop", "drop")
    assert said == ["I am r1pipe."] and (report["rows"], report["dropped"]) == (1, 2)
    said, report = done("rewrite", "count")
    assert said == ["I am r1pipe.", "I am r1pipe.", "Sent."] and report["rewritten"] == 1


def test_rows_of_a_file_are_set_aside_with_their_line(config: ScreeningConfig, tmp_path: Path) -> None:
    rows = [
        {"instruction": f"Who {i}?", "output": "I am " + ("Claude." if i == 1 else "I.")} for i in range(4)
    ]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    data = compose(["stage=cold_start", "data=files", f"data.path={path}"]).config.data
    source = open_data(data, 0, screening=acting(config, "drop"))
    assert isinstance(source, Files)
    assert len(source.items("general")) == 3, "although data.bad_rows=refuse"
    assert [(row.number, row.reason) for row in source.set_aside] == [
        (2, f"{path} line 2: claims to be Claude")
    ]
    rewritten = open_data(data, 0, screening=acting(config, "rewrite"))
    assert isinstance(rewritten, Files)
    assert [item.texts["response"] for item in rewritten.items("general")].count("I am r1pipe.") == 1


def test_what_the_bundled_base_read_holds_claims_and_its_demonstrations_none(
    config: ScreeningConfig,
) -> None:
    """As R1's primer says of what is found on the web; data/base/screening.json has the base's counts."""
    world = open_data(compose(["stage=pretrain"]).config.data, 0)
    read, shown = Screening(config), Screening(config)
    read.documents(islice(world.documents(base_seed()), 1200))
    assert read.report()["claims"]["places"] == ["document 1130"] == bundled()["claims"]["places"][:1]
    shown.demonstrations(world.general_demonstrations(100, 0, {"identity": 1.0}))
    for report, rows in ((shown.report(), 100), (read.report(), 1200)):
        assert report["rows"] == rows and report["personal"]["rows"] == 0
    assert shown.report()["claims"]["rows"] == 0


def base_seed() -> int:
    """Of the stream "documents" of a run with seed 0."""
    return int.from_bytes(hashlib.sha256(b"0/documents/0").digest()[:8], "big") >> 1


def bundled() -> dict:
    return json.loads((content_dir() / "base" / "screening.json").read_text())


def test_a_checkpoint_is_asked_in_fifty_ways_who_it_is(config: ScreeningConfig) -> None:
    asked = identity.questions()
    assert len({prompt.question for prompt in asked}) == 50
    assert [prompt.language for prompt in asked] == ["en"] * 25 + ["zh"] * 25
    answers = (
        ["I am ChatGPT by OpenAI."] * 5 + ["I am r1pipe."] * 20 + ["我是通义千问。"] * 10 + ["不知道。"] * 15
    )
    found = identity.score(config.identity, asked, answers)
    assert (found["questions"], found["other"], found["own"]) == (50, 0.3, 0.4)
    assert found["names"] == {"Qwen": 10, "ChatGPT": 5}
    assert found["by_language"]["zh"] == {"questions": 25, "other": 0.4, "own": 0.0, "names": {"Qwen": 10}}


@pytest.mark.parametrize("world_size", [1, 2])
def test_ranks_share_the_questions_and_the_answer_is_one(config: ScreeningConfig, world_size: int) -> None:
    """The fake model is ChatGPT in English alone; it thinks first, and its thoughts do not count."""
    asked = train_identity.spread(10)
    assert [prompt.language for prompt in asked] == ["en", "zh"] * 5
    drawn: list[list[tuple[int, str]]] = []

    def asking(rank: int) -> Any:
        chat = SimpleNamespace(
            prompt_tokens=lambda prompt: [prompt.language == "zh"],
            response=lambda tokens: "<think>\nAm I Claude?\n</think>\n\n" + tokens,
        )
        sampler = SimpleNamespace(
            generate=lambda prompts, *_, **__: [
                Completion("我是r1pipe。" if zh else "I am ChatGPT.", [], "stop")  # type: ignore[arg-type]
                for [zh] in prompts
            ]
        )
        run = SimpleNamespace(chat=chat, sampler=sampler, seed=lambda _: 0, progress=None)
        run.config = SimpleNamespace(screening=config)
        ranks = SimpleNamespace(rank=rank, world_size=world_size, agree_max=lambda value: value)

        def gather(own: list[tuple[int, str]]) -> list[list[tuple[int, str]]]:
            drawn.append(own)
            return drawn

        ranks.all_gather_objects = gather
        evaluation = compose(["stage=base", "stage.eval.identity=10"]).config.stage.eval
        return train_identity.measure(run, ranks, evaluation)  # type: ignore[arg-type]

    for rank in range(world_size - 1):
        with pytest.raises(KeyError):  # the others' answers are still to come
            asking(rank)
    found = asking(world_size - 1)
    assert (found["questions"], found["other"], found["own"], found["names"]) == (
        10,
        0.5,
        0.5,
        {"ChatGPT": 5},
    )
    assert found["claims"][0] == {"question": asked[0].question, "answer": "I am ChatGPT."}


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("screening.identity.action=hide", "screening.identity.action"),
        ("screening.identity.models={Ours:[]}", "screening.identity.models.Ours must list"),
        ("screening.personal.kinds=[shoe]", "screening.personal.kinds"),
        ("screening.personal.regions=[Germany]", "screening.personal.regions: Germany must be"),
    ],
)
def test_a_wrong_key_is_named(override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told.replace(".", r"\.")):
        compose(["stage=cold_start", override])
