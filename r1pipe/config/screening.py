"""What training data is looked over for: claims to be another model, personal data and secrets."""

from dataclasses import dataclass
from typing import Literal

from r1pipe.config.fields import Rules, Strict

Kind = Literal["email", "phone", "ip_address", "credit_card", "iban", "chinese_id", "secret"]


@dataclass
class IdentityConfig(Strict):
    """Responses in which the model says that it is another one ("I am ChatGPT")."""

    action: Literal["count", "drop", "rewrite"]  # rewrite: `name` and `maker` take the place of theirs
    name: str  # this model's name; a claim to be it is none
    maker: str  # who made it
    models: dict[str, list[str]]  # other models -> how they are written, in any case
    makers: dict[str, list[str]]  # other makers -> how they are written, in any case


@dataclass
class PersonalConfig(Strict):
    """Personal data and secrets in prompts and responses."""

    action: Literal["count", "drop"]  # drop: the row is set aside
    kinds: list[Kind]  # what is looked for
    regions: list[str]  # countries (ISO 3166) whose phone numbers are known without +COUNTRY


@dataclass
class ScreeningConfig(Strict):
    """What training data is looked over for, and what is done with it."""

    name: str  # the file in conf/screening/
    identity: IdentityConfig
    personal: PersonalConfig


def screening_rules(screening: ScreeningConfig) -> Rules:
    identity = screening.identity
    for key in ("models", "makers"):
        for name, spellings in getattr(identity, key).items():
            if not spellings or not all(spelling.strip() for spelling in spellings):
                yield f"screening.identity.{key}.{name} must list at least one spelling, and no empty one"
    if identity.action == "rewrite" and not (identity.name.strip() and identity.maker.strip()):
        yield "screening.identity.action=rewrite needs screening.identity.name and screening.identity.maker"
    for region in screening.personal.regions:
        if not (len(region) == 2 and region.isascii() and region.isupper()):
            yield f"screening.personal.regions: {region} must be a country's two letters, e.g. US"
