"""What differs between a run and the config that is to go on with it, and which differences may be.

No torch here: the command line compares before it launches.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from r1pipe.config.data import SOURCES
from r1pipe.config.fields import shown
from r1pipe.config.groups import flat, upwards
from r1pipe.config.run import RunConfig, to_mapping

# Keys that may change when a run is resumed, each with all keys below it, and why. With those of SAME_BITS
# another value computes the same to the last bit, so they are no part of a config's hash.
SAME_BITS = {
    "root": "where run folders lie",
    "tracking": "who watches",
    "recipe": "what else will run",
    "judge": "how the judge was named; `judge_from` says which it is, and a server is known by its answers",
    "parent": "how the parent was named; `weights_from` says which it is",
    "tripwires": "when to warn or to pause",
    "data.licence": "what the record says of the data",
    "stage.save_every": "when to save",
    "stage.keep": "what to keep",
    "stage.keep_best": "what to keep",
    "stage.keep_best_direction": "what to keep",
    "engine.async_save": "how to save",
    "engine.grace_s": "when to give up on a rank",
    "engine.stuck_after_s": "when to give up on a rank",
    "engine.collective_limit_s": "when to give up on a rank",
    "engine.control_limit_s": "when to give up on a rank",
    "engine.master_addr": "where the ranks meet",
    "engine.master_port": "where the ranks meet",
    "engine.ssh_port": "where the ranks meet",
    "engine.name": "which file the other keys come from",
}
SAME_WITHIN_ROUNDING = {
    "engine.ranks": "sums over ranks are taken in another order",
    "engine.threads": "sums within a rank are taken in another order",
    "engine.zero_level": "where the optimizer's state lies",
    "engine.expert_parallel": "where the experts are",
    "engine.pipeline": "where the layers are",
    "engine.schedule": "in which order micro-batches are taken",
    "engine.hostfile": "where the ranks are",
    "engine.launcher": "where the ranks are",
    "engine.launcher_args": "where the ranks are",
    "engine.interpreter": "where the ranks are",
    "engine.slurm": "where the ranks are",
    "engine.gradient_accumulation": "how much is computed at once",
    "engine.equal": "in which order sums are taken",
    "engine.recompute": "what is kept in memory for the backward pass",
    "engine.offload": "what is kept in memory for the backward pass",
    "sampler": "where the server is, and when to give up on it",
    "stage.judge.key_variable": "how the server knows us",
    "stage.judge.timeout_s": "when to give up on a server",
    "stage.judge.retries": "when to give up on a server",
    "stage.judge.parallel": "how much is asked at once",
    "stage.teacher.key_variable": "how the server knows us",
    "stage.teacher.timeout_s": "when to give up on a server",
    "stage.teacher.retries": "when to give up on a server",
    "stage.teacher.parallel": "how much is asked at once",
    "stage.max_tokens_per_micro_batch": "how much is computed at once",
    "stage.rl.max_tokens_per_micro_batch": "how much is computed at once",
    "stage.ranking.max_tokens_per_micro_batch": "how much is computed at once",
    "stage.rewards.plugin_limits": "when to give up on a call",
    "stage.rewards.remote": "where the servers are",
    "stage.rewards.remote_limits": "when to give up on a server",
    "stage.rl.rewards.plugin_limits": "when to give up on a call",
    "stage.rl.rewards.remote": "where the servers are",
    "stage.rl.rewards.remote_limits": "when to give up on a server",
}
ABSENT = "(none)"  # a key that one of the two configs lacks
SHOWN = 5  # changes that a message lists
# compared by the hash of what they published
PARENTS = ("weights_from", "reads_from", "teacher_from", "judge_from")
HASH_SHOWN = 12


@dataclass(frozen=True)
class Change:
    """One key with another value; ABSENT where a side has none."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        old, new = shown(self.old), shown(self.new)
        if self.key.startswith((*PARENTS, "code.")) or self.key.endswith(".hash"):
            old, new = old[:HASH_SHOWN], new[:HASH_SHOWN]
        return f"{self.key}: {old} -> {new}"

    @property
    def same_bits(self) -> bool:
        return any(part in SAME_BITS for part in upwards(self.key))

    @property
    def allowed(self) -> bool:
        return self.same_bits or any(part in SAME_WITHIN_ROUNDING for part in upwards(self.key))


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """What differs between two configs as mappings, in the order of `new`; a parent counts by its weights,
    not by its place. `old` may be of another version of r1pipe, with other keys: a new one that is null,
    and so unused, is no change."""
    before, after = (dict(flat(by_weights(mapping))) for mapping in (old, new))
    keys = [*after, *(key for key in before if key not in after)]
    pairs = ((key, before.get(key, ABSENT), after.get(key, ABSENT)) for key in keys)
    return [Change(*pair) for pair in pairs if pair[1] != pair[2] and pair[1:] != (ABSENT, None)]


def by_weights(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The config with each parent replaced by the hash of what it published, and no source's licence."""
    reads = {stage: parent.get("hash") for stage, parent in (mapping.get("reads_from") or {}).items()}
    found = {key: mapping.get(key) for key in PARENTS if key != "reads_from"}
    single = {key: parent.get("hash") if parent else None for key, parent in found.items()}
    data = {"data": _without_licences(mapping["data"])} if "data" in mapping else {}
    return {**mapping, **single, "reads_from": reads, **data}


def _without_licences(data: Mapping[str, Any]) -> dict[str, Any]:
    """The group `data` without what is only recorded of its sources."""
    return {
        key: [{name: part for name, part in source.items() if name != "licence"} for source in value]
        if key in SOURCES
        else value
        for key, value in data.items()
    }


def listed(found: Iterable[Change]) -> str:
    """A handful of changes in one line."""
    lines = [str(change) for change in found]
    more = f", and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
    return ", ".join(lines[:SHOWN]) + more


def config_hash(config: RunConfig) -> str:
    """SHA-256 over all that decides what a run computes; a parent counts by its weights, not its place."""
    return mapping_hash(to_mapping(config))


def mapping_hash(mapping: Mapping[str, Any]) -> str:
    """`config_hash` of a config.json as it was read, which an older version may have written.

    Raises AttributeError where a parent in it is no mapping.
    """
    canonical = json.dumps(decisive(mapping), sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def decisive(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The config's dotted keys and values, without those that do not change what a run computes."""
    values = flat(by_weights(mapping))
    return {key: value for key, value in values if not any(part in SAME_BITS for part in upwards(key))}
