"""The servers that a job asks: how a chat server is asked, and whether all of them answer.

`check_servers` asks each of them once, before a job starts: what is not there would else be noticed only once
models are loaded.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit

from r1pipe.config import DistillConfig, EvaluateConfig, RLConfig, RunConfig
from r1pipe.config.answerer import AnswererConfig, is_server
from r1pipe.config.custom_rewards import on_servers
from r1pipe.core import http
from r1pipe.core.errors import EnvironmentProblem
from r1pipe.core.paths import RunFolder
from r1pipe.runs.judge_quality import judge_of

REPLY_LIMIT = 1 << 26  # bytes
BACKOFF_S = 1.0  # before the second try; twice as long before each further one
PATIENCE_S = 10.0  # for a server to answer before a job starts


def base_url(url: str) -> str:
    """The address below which a chat server's endpoints are: /v1 where none is given."""
    return url.rstrip("/") if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/v1"


def request(
    key: str, url: str, path: str, body: dict[str, Any] | None, config: AnswererConfig
) -> dict[str, Any]:
    """What a chat server replies, a JSON object; `key` is what the user wrote the server to. Raises
    EnvironmentProblem where there is no such reply after all tries."""
    token = os.environ.get(config.key_variable)
    why = ""
    for attempt in range(config.retries + 1):
        if attempt:
            time.sleep(BACKOFF_S * 2 ** (attempt - 1))
        try:
            content = http.request(f"{base_url(url)}{path}", body, token, config.timeout_s, REPLY_LIMIT)
            reply = json.loads(content)
            if isinstance(reply, dict):
                return reply
            why = "no JSON object"
        except (OSError, HTTPException) as error:
            why = http.reason(error)
            if isinstance(error, HTTPError) and not http.may_recover(error):
                break
        except (ValueError, RecursionError) as error:
            why = f"no JSON ({error})"
    if token:
        why = why.replace(token.strip(), "***")
    raise EnvironmentProblem(
        f"{key}: {base_url(url)}{path} fails ({why}; requests: {attempt + 1}); see that the server runs, "
        f"with its key in ${config.key_variable} if it wants one, and run the same command again"
    )


def served_model(key: str, url: str, config: AnswererConfig) -> str:
    """The model to ask a chat server for: served_name, or the first that it lists. Raises EnvironmentProblem
    where none answers, or it has no such model."""
    listed = request(key, url, "/models", None, config).get("data")
    if not isinstance(listed, list):
        raise EnvironmentProblem(f"{key}: {base_url(url)}/models lists no models; is it a chat server?")
    served = [str(model.get("id")) for model in listed if isinstance(model, dict)]
    model = config.served_name or next(iter(served), "")
    if model not in served:
        raise EnvironmentProblem(
            f"{key}={url} serves {', '.join(served) or 'no model'} and not {model or 'any'}; "
            "choose one with served_name"
        )
    return model


def check_servers(config: RunConfig, run: RunFolder | None = None) -> list[str]:
    """The keys of the servers that the stage asks. `run`: where it has all answers of a teacher, that is
    not asked again. Raises EnvironmentProblem where one does not answer."""
    found = []
    for key, url, settings in chat_servers(config, run):
        patience_s = min(PATIENCE_S, settings.timeout_s)
        served_model(key, url, replace(settings, retries=0, timeout_s=patience_s))
        found.append(key)
    for key, url in other_servers(config):
        try:
            http.request(url, None, None, PATIENCE_S, REPLY_LIMIT)
        except HTTPError as error:
            error.close()  # it answers; the job will see whether it answers right
        except TimeoutError:  # it has taken the request, and is busy
            pass
        except (OSError, HTTPException, ValueError) as error:
            why = http.reason(error) if not isinstance(error, ValueError) else str(error)
            raise EnvironmentProblem(
                f"{key}: no server answers at {url} ({why}); start it, then run the same command"
            ) from None
        found.append(key)
    return found


def chat_servers(config: RunConfig, run: RunFolder | None) -> Iterator[tuple[str, str, AnswererConfig]]:
    """(key, URL, how it is asked) of each teacher and judge that is a server and is still to be asked."""
    stage = config.stage
    if isinstance(stage, DistillConfig) and config.teacher and is_server(config.teacher):
        scores = stage.rl is not None and stage.rl.score_weight > 0  # what the student draws as it learns
        if scores or run is None or not run.dataset.exists():
            yield "teacher", config.teacher, stage.teacher
    judge = judge_of(config)
    if judge is None:
        return
    if config.judge and is_server(config.judge):
        yield "judge", config.judge, judge
    baseline = stage.judge.baseline if isinstance(stage, EvaluateConfig) and stage.judge else None
    if baseline and is_server(baseline):
        yield "stage.judge.baseline", baseline, replace(judge, served_name=None)


def other_servers(config: RunConfig) -> Iterator[tuple[str, str]]:
    """(key, URL) of a sampler and of rewards that are servers."""
    if config.engine.sampler == "vllm" and config.sampler.url is not None:
        yield "sampler.url", f"{config.sampler.url.rstrip('/')}/health"
    stage = config.stage
    rl, place = (stage, "stage") if isinstance(stage, RLConfig) else (getattr(stage, "rl", None), "stage.rl")
    for reward in on_servers(rl.rewards.remote, rl.rewards.weights) if rl else ():
        yield f"{place}.rewards.remote.{reward.name}", reward.location
