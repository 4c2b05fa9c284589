"""Secrets stay in memory: what is written of a config or a message has no password or token in it.

`r1pipe` writes no environment variables at all; what can slip through is an address with a login in it
(tracking.uri=https://name:password@host), and the value of a secret variable inside somebody's message.
"""

import os
import re
from typing import Any

HIDDEN = "***"
SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
LOGIN = re.compile(r"(?P<scheme>\b[\w+.-]+://)[^/\s?#'\"]*@")  # name:password@, whatever is in it
SECRET_PARAMETER = re.compile(r"(?P<name>[?&;][\w.-]*(?:token|key|secret|passw\w*)=)[^&;#\s]+", re.IGNORECASE)
SHORTEST = 8  # characters of a value that is looked for: shorter ones are words too


def without_login(address: str) -> str:
    """An address without name and password, which whoever uses it takes from the environment then."""
    return SECRET_PARAMETER.sub(rf"\g<name>{HIDDEN}", LOGIN.sub(r"\g<scheme>", address))


def without_secrets(text: str) -> str:
    """A message for screens and logs: no logins, and no value of a variable that is called a secret."""
    text = without_login(text)
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= SHORTEST and "/" not in value[:1]:
            text = text.replace(value, HIDDEN)
    return text


def publishable(content: Any) -> Any:
    """A config, or a part of it, with logins taken out of every text; everything else as it is."""
    if isinstance(content, dict):
        return {key: publishable(value) for key, value in content.items()}
    if isinstance(content, list):
        return [publishable(value) for value in content]
    return without_login(content) if isinstance(content, str) else content
