"""What `r1pipe serve` takes on: conf/serve. `serve.KEY=VALUE` is for that command alone."""

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from r1pipe.config.fields import AboveZero, Positive, Rules, Strict


@dataclass
class ServeConfig(Strict):
    """Where the server listens, and its limits."""

    host: str  # address to listen on; another than this machine's own gives a warning
    port: Annotated[int, Field(ge=0, le=65535)]  # 0: a free one, which is shown
    key_variable: str  # environment variable with the key that clients must show; unset: none
    max_num_seqs: Positive  # answers that are drawn together
    max_waiting: Positive  # answers that wait for that; beyond it: status 429
    max_connections: Positive  # clients at a time; beyond it: status 503
    max_n: Positive  # answers to one prompt
    max_stop: Positive  # stop strings of a request
    max_top_logprobs: Positive  # alternatives of each token that a request may ask for
    max_body_mb: AboveZero  # of a request; beyond it: status 413
    request_s: AboveZero  # a request may take so long; beyond it: status 503
    client_s: AboveZero  # a client may be silent or read nothing for so long
    grace_s: AboveZero  # after SIGINT or SIGTERM, for the answers under way


def serve_rules(config: ServeConfig) -> Rules:
    if not re.fullmatch(r"[A-Za-z_]\w*", config.key_variable):
        yield f"serve.key_variable={config.key_variable} must be the name of an environment variable"
