"""Who answers besides the policy, a teacher or a judge: how it is asked, and what is recorded of it."""

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from r1pipe.config.fields import AboveZero, Count, NonNegative, Positive, Rules, Strict


@dataclass
class AnswererConfig(Strict):
    """All but `licence` is of a server, which is asked in OpenAI's protocol."""

    licence: str | None  # of its answers, for the record; null: unknown, or what a model card beside it says
    served_name: str | None  # the model to ask for; null: the first that the server lists
    key_variable: str  # environment variable that holds the server's API key; it may be unset
    timeout_s: AboveZero  # of one request
    retries: Count  # of a request that failed on the way, or with status 408, 429 or 5xx
    parallel: Positive  # requests at a time
    usd_per_million_prompt_tokens: NonNegative  # price, for the record
    usd_per_million_completion_tokens: NonNegative  # price, for the record


def is_server(name: str) -> bool:
    """Whether what a user names is a server and no checkpoint."""
    return re.match(r"https?://", name, re.IGNORECASE) is not None


def answerer_rules(key: str, name: str | None, settings: str, config: AnswererConfig) -> Rules:
    """`key`=`name` is what the user wrote; `settings`, the config's place."""
    if not re.fullmatch(r"[A-Za-z_]\w*", config.key_variable):
        yield f"{settings}.key_variable={config.key_variable} must be the name of an environment variable"
    if name is not None and not is_server(name) and "://" in name:
        yield f"{key}={name} is no address of a server; it must be http://HOST:PORT/v1 or https://HOST/v1"
    if name is None or not is_server(name):
        return
    try:
        parts = urlsplit(name)
        fine = bool(parts.hostname) and parts.port != 0 and not parts.query and not parts.fragment
    except ValueError:
        parts, fine = None, False
    if parts is None or not fine:
        yield f"{key}={name} must be http://HOST:PORT/v1 or https://HOST/v1"
    elif parts.username or parts.password:
        yield f"{key} holds a user or password; put the server's key into ${config.key_variable} instead"
