"""`r1pipe serve`: its settings, and the server that this process becomes."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from r1pipe.cli.options import Checkpoint, Overrides, composed
from r1pipe.cli.scripts import resolved
from r1pipe.config import script_options
from r1pipe.config.fields import build, check_all
from r1pipe.config.planning import chosen
from r1pipe.config.script_options import ServeOptions
from r1pipe.config.serving import ServeConfig, serve_rules

GROUP = "serve"


def serve(
    checkpoint: Checkpoint,
    overrides: Overrides = None,
    port: Annotated[int | None, typer.Option(help="none: serve.port; 0: a free one, which is shown")] = None,
    host: Annotated[str | None, typer.Option(help="none: serve.host, which is this machine alone")] = None,
    name: Annotated[str | None, typer.Option(help="of the model for clients; none: its run id")] = None,
) -> None:
    """Serve a checkpoint in OpenAI's protocol until Ctrl-C: serve grpo --port 8000

    Chat and completions, streamed or not; requests are drawn together. Overrides: serve.KEY=VALUE for the
    limits (conf/serve/default.yaml), and where the checkpoint is; chat.system=TEXT gives another system
    prompt. $R1PIPE_SERVE_KEY, if set, is the key that clients must show.
    """
    from r1pipe.launch import command as launch

    own = [word for word in overrides or [] if word.partition("=")[0].partition(".")[0] == GROUP]
    others = [word for word in overrides or [] if word not in own]
    own += [f"{GROUP}.{key}={value}" for key, value in (("port", port), ("host", host)) if value is not None]
    limits = settings(own)
    found = resolved(checkpoint, others)
    called = name or found.run_id or Path(found.checkpoint).name
    options = ServeOptions(Path(found.checkpoint), called, limits, composed(others).chat.system)
    with tempfile.TemporaryFile() as file:
        script_options.write(options, Path(f"/dev/fd/{file.fileno()}"))
        file.seek(0)
        launch.become_script("serve.py", file)


def settings(overrides: list[str]) -> ServeConfig:
    """conf/serve with overrides of its keys; others are left alone. Raises ConfigError."""
    config = build(ServeConfig, chosen(GROUP, overrides, "default", {}, GROUP), GROUP)
    check_all(serve_rules(config))
    return config
