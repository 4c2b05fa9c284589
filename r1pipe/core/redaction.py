"""Removes passwords and tokens from configs and messages before they are written.

`r1pipe` writes no environment variables. What remains is URLs with a login (https://name:password@host), and
the values of secret variables inside messages of libraries.
"""

import os
import re
from typing import Any

HIDDEN = "***"
SECRET_NAME = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
LOGIN = re.compile(r"(?P<scheme>\b[\w+.-]+://)[^/\s?#'\"]*@")  # name:password@
SECRET_PARAMETER = re.compile(r"(?P<name>[?&;][\w.-]*(?:token|key|secret|passw\w*)=)[^&;#\s]+", re.IGNORECASE)
SHORTEST = 8  # characters: shorter values could be ordinary words


def without_login(address: str) -> str:
    """A URL without its login and secret parameters."""
    return SECRET_PARAMETER.sub(rf"\g<name>{HIDDEN}", LOGIN.sub(r"\g<scheme>", address))


def without_secrets(text: str) -> str:
    """A message without logins and the values of secret variables."""
    text = without_login(text)
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= SHORTEST and "/" not in value[:1]:
            text = text.replace(value, HIDDEN)
    return text


def publishable(content: Any) -> Any:
    """A config, or part of one, without logins in its strings."""
    if isinstance(content, dict):
        return {key: publishable(value) for key, value in content.items()}
    if isinstance(content, list):
        return [publishable(value) for value in content]
    return without_login(content) if isinstance(content, str) else content
