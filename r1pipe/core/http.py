"""One JSON request to a server of the user's: no redirects, a limit of time and of size, a bearer token."""

import json
import time
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.request import HTTPRedirectHandler, Request, build_opener

SAID = 200  # characters shown of what a server says
TRY_AGAIN = (408, 429)  # and 5xx: the same request may succeed later


class _NoRedirect(HTTPRedirectHandler):
    """A token must not follow to another place, and a POST would become a GET."""

    def redirect_request(self, *given: Any) -> None:
        return None


_opener = build_opener(_NoRedirect)


def request(url: str, body: Any, token: str | None, timeout_s: float, limit: int) -> bytes:
    """What the server replies to a POST of `body` as JSON, or to a GET where `body` is None.

    Raises HTTPError on a status of 300 or more, OSError or HTTPException where no whole reply arrives in
    `timeout_s` seconds, and ValueError where it has more than `limit` bytes.
    """
    headers = {"Content-Type": "application/json"}
    if token:
        headers["Authorization"] = f"Bearer {token.strip()}"
    sent = None if body is None else json.dumps(body, default=list).encode()
    deadline = time.monotonic() + timeout_s
    content = b""
    with _opener.open(Request(url, sent, headers), timeout=timeout_s) as response:
        while piece := response.read1(1 << 16):
            content += piece
            if len(content) > limit:
                raise ValueError(f"more than {limit} bytes")
            if time.monotonic() > deadline:  # a byte now and then keeps a connection open for ever
                raise TimeoutError("timed out")
    return content


def may_recover(error: HTTPError) -> bool:
    """Whether the same request may succeed later."""
    return error.code >= 500 or error.code in TRY_AGAIN


def reason(error: OSError | HTTPException) -> str:
    """Why a request failed, in one line; of a status, with what the server says about it."""
    if not isinstance(error, HTTPError):  # URLError and TimeoutError are OSErrors
        cause = getattr(error, "reason", "") or error
        return getattr(cause, "strerror", None) or str(cause) or type(error).__name__
    with error:
        try:
            content: bytes = error.read1(SAID)
        except (OSError, HTTPException):
            content = b""
    said = " ".join(content.decode("utf-8", "replace").split())
    return f"{error.code} {error.reason}" + (f": {said}" if said else "")
