"""Personal data and secrets in texts, by kind.

Phone numbers are checked by libphonenumber's rules (phonenumbers), keys and tokens by the patterns of
detect-secrets, cards, bank accounts and Chinese identity numbers by their check digits. Names of people and
addresses are not looked for.
"""

import ipaddress
import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from r1pipe.config.screening import PersonalConfig

_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]+@(?:[a-z0-9-]+\.)+[a-z]{2,}\b", re.IGNORECASE | re.ASCII)
_RESERVED = ("example.com", "example.org", "example.net", ".example", ".test", ".invalid", ".localhost")
_IP = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.]*\d)", re.ASCII)
_DOTTED = re.compile(r"\d\.\d{1,3}\.\d{1,3}\.\d")
_CARD = re.compile(r"(?<![\d.,-])\d(?:[ -]?\d){12,18}(?![\d]|[.,]\d)")
# Issuers' first digits and lengths: Visa, Mastercard, American Express, Discover, UnionPay.
_ISSUER = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})|(?:5[1-5]|2[2-7])\d{14}|3[47]\d{13}|6(?:011|5\d\d)\d{12}|62\d{14,17}"
)
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_COUNTRY = re.compile(r"[A-Z][A-Z]\d\d")  # what an IBAN begins with
_CHINESE_ID = re.compile(
    r"(?<!\d)[1-8]\d{5}(?:19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?!\w)", re.ASCII
)
_PHONE = re.compile(
    r"(?<![\w.+/=*-])(?:\+\d{1,3}[\s().-]*\d(?:[\s().-]{0,2}\d){6,12}|\(\d{3}\)\s?\d{3}-\d{4}|\d{3}-\d{3}-\d{4}|1[3-9]\d{9})"
    r"(?![\w/=*-]|\.\d)",
    re.ASCII,
)
_SECRET_PLUGINS = (
    *("aws.AWSKeyDetector", "azure_storage_key.AzureStorageKeyDetector"),
    *("cloudant.CloudantDetector", "discord.DiscordBotTokenDetector", "github_token.GitHubTokenDetector"),
    *("gitlab_token.GitLabTokenDetector", "jwt.JwtTokenDetector", "mailchimp.MailchimpDetector"),
    *("npm.NpmDetector", "openai.OpenAIDetector", "private_key.PrivateKeyDetector"),
    *("pypi_token.PypiTokenDetector", "sendgrid.SendGridDetector", "slack.SlackDetector"),
    *("square_oauth.SquareOAuthDetector", "stripe.StripeDetector", "telegram_token.TelegramBotTokenDetector"),
    "twilio.TwilioKeyDetector",
)
# A text with none of these has none of the secrets above: most texts are done after one look.
_SIGNS = (
    *(
        "AKIA",
        "A3T",
        "ABIA",
        "ACCA",
        "ASIA",
        "aws",
        "AccountKey=",
        "cloudant",
        "ghp_",
        "gho_",
        "ghu_",
        "ghs_",
        "ghr_",
    ),
    *(
        "glpat-",
        "gldt-",
        "glft-",
        "glsoat-",
        "glrt-",
        "GR1348941",
        "eyJ",
        "_authToken",
        "T3BlbkFJ",
        "PRIVATE KEY",
    ),
    *("pypi-AgE", "SG.", "xox", "hooks.slack.com", "sq0csp-", "k_live_"),
)
LONG = 24  # characters: the other secrets are such long words
_LONG_WORD = re.compile(rf"[A-Za-z0-9_-]{{{LONG}}}")
_LONG_NUMBER = re.compile(r"\d(?:[\s().-]{0,3}\d){6}")  # in all phone numbers, cards and identity numbers


def found(text: str, config: PersonalConfig) -> list[str]:
    """The kinds of what a text holds, once for each that is found."""
    has_number = _LONG_NUMBER.search(text) is not None
    kinds = [kind for kind in config.kinds if has_number or kind not in _OF_DIGITS]
    return [kind for kind in kinds for _ in _FINDERS[kind](text, config)]


def _emails(text: str, _: PersonalConfig) -> list[str]:
    if "@" not in text:
        return []
    return [word for word in _EMAIL.findall(text) if not word.lower().endswith(_RESERVED)]


def _ip_addresses(text: str, _: PersonalConfig) -> list[str]:
    """Those of the public internet."""
    return [word for word in _IP.findall(text) if _is_public(word)] if _DOTTED.search(text) else []


def _is_public(word: str) -> bool:
    try:
        return ipaddress.ip_address(word).is_global
    except ValueError:
        return False


def _credit_cards(text: str, _: PersonalConfig) -> list[str]:
    words = (re.sub(r"[ -]", "", word) for word in _CARD.findall(text))
    return [word for word in words if _ISSUER.fullmatch(word) and luhn(word)]


def luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of ISO/IEC 7812."""
    doubled = (int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits)))
    return sum(value - 9 if value > 9 else value for value in doubled) % 10 == 0


def _ibans(text: str, _: PersonalConfig) -> list[str]:
    if not _COUNTRY.search(text):
        return []
    words = (word.replace(" ", "") for word in _IBAN.findall(text))
    return [word for word in words if 15 <= len(word) <= 34 and iban(word)]


def iban(word: str) -> bool:
    """Whether the check digits of ISO 13616 are right."""
    return int("".join(str(int(sign, 36)) for sign in word[4:] + word[:4])) % 97 == 1


def _chinese_ids(text: str, _: PersonalConfig) -> list[str]:
    return [word for word in _CHINESE_ID.findall(text) if chinese_id(word)]


def chinese_id(word: str) -> bool:
    """Whether the check digit of GB 11643 is right."""
    total = sum(int(digit) * 2 ** (17 - place) for place, digit in enumerate(word[:17]))
    return "10X98765432"[total % 11] == word[17].upper()


def _phones(text: str, config: PersonalConfig) -> Iterator[str]:
    for word in _PHONE.findall(text):
        import phonenumbers

        for region in config.regions if word[0] != "+" else [None]:
            try:
                if phonenumbers.is_valid_number(phonenumbers.parse(word, region)):
                    yield word
                    break
            except phonenumbers.NumberParseException:
                continue


def _secrets(text: str, _: PersonalConfig) -> Iterator[str]:
    longest = max(map(len, text.split()), default=0)
    if any(sign in text for sign in _SIGNS) or (longest >= LONG and _LONG_WORD.search(text)):
        for detector in _detectors():
            yield from (secret for secret in detector.analyze_string(text) if secret)


@cache
def _detectors() -> list[Any]:
    """detect-secrets' patterns. It would ask services whether a key is valid only if it were told to."""
    from importlib import import_module

    places = (name.split(".") for name in _SECRET_PLUGINS)
    return [getattr(import_module(f"detect_secrets.plugins.{module}"), name)() for module, name in places]


_OF_DIGITS = ("phone", "credit_card", "chinese_id")
_FINDERS: dict[str, Callable[[str, PersonalConfig], Any]] = {
    "email": _emails,
    "phone": _phones,
    "ip_address": _ip_addresses,
    "credit_card": _credit_cards,
    "iban": _ibans,
    "chinese_id": _chinese_ids,
    "secret": _secrets,
}
