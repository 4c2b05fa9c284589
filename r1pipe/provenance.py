"""record.json: what made a checkpoint, written last. Its parents, data, config, code, and their hashes."""

import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from r1pipe import machine
from r1pipe.checkpoints import manifest_hash
from r1pipe.config import config_hash
from r1pipe.config.schema import RunConfig
from r1pipe.data.chat import Chat
from r1pipe.paths import RunFolder


def job_record(
    folder: RunFolder, config: RunConfig, checkpoint: Path, chat: Chat, made: dict[str, Any]
) -> dict[str, Any]:
    """The record of a finished job; `made` holds what only the job knows (times, metrics, data hash)."""
    return {
        "run_id": folder.run_id,
        "stage": config.stage.name,
        "seed": config.seed,
        "pipeline": config.pipeline,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "parents": {
            "weights": asdict(config.weights_from) if config.weights_from else None,
            "data": [asdict(parent) for parent in config.reads_from.values()],
        },
        "config_hash": config_hash(config),
        "code": _code(folder.env),
        "tokenizer_hash": chat.tokenizer_hash,
        "template_hash": chat.template_hash,
        "checkpoint": checkpoint.relative_to(folder.path).as_posix(),
        "checkpoint_hash": manifest_hash(checkpoint),
        "versions": {name: machine.version(name) for name in machine.PACKAGES},
        **made,
    }


def write_json(path: Path, content: Any) -> None:
    """Whole or not at all: other processes watch for these files."""
    temporary = path.with_suffix(".partial")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def _code(env: Path) -> dict[str, Any]:
    """The git revision that the launcher wrote down; unknown where a script was started by hand."""
    known = json.loads(env.read_text(encoding="utf-8")).get("code", {}) if env.exists() else {}
    return {"revision": known.get("revision"), "dirty": known.get("dirty")}
