"""Which correction reinforcement makes where the sampler is not the trainer, and what must be true of it."""

from collections.abc import Mapping
from typing import Any, Literal

from r1pipe.config.fields import Rules
from r1pipe.config.groups import options, read

Importance = Literal[
    "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask", "geometric_mask"
]
FOLDER = "stage/part/importance"
OWN_SAMPLER = {"sampler": "bundled", "sampler_precision": "same", "async_steps": 0}  # weights in training
KEYS = ("importance", "importance_cap", "importance_floor")


def settled(stage: Mapping[str, Any], engine: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The keys of a stage's correction that are still null, with their values, and the file that gives them.

    Where no correction is named, it is token_truncate if a bound is given or the sampler computes other
    probabilities than the trainer, and none otherwise.
    """
    name, bounds = stage[KEYS[0]], [stage[key] for key in KEYS[1:] if stage[key] is not None]
    if name is None:
        name = "token_truncate" if (any(bounds) if bounds else sampler_differs(engine)) else "none"
    if name not in options(FOLDER):  # the field's type says what there is
        return {}, ""
    values = read(f"{FOLDER}/{name}")
    return {key: values[key] for key in KEYS if stage[key] is None}, f"conf/{FOLDER}/{name}.yaml"


def sampler_differs(engine: Mapping[str, Any]) -> bool:
    """Whether completions are drawn from other probabilities than the trainer computes.

    In float32 the bundled sampler's differ by rounding alone. In a narrower type its decoding adds up in
    another order, so that a router may choose other experts, unless engine.equal makes it the same.
    """
    if any(engine.get(key, usual) != usual for key, usual in OWN_SAMPLER.items()):
        return True
    return engine.get("precision") != "fp32" and not engine.get("equal")


def importance_rules(name: str, cap: float, floor: float) -> Rules:
    if name == "none":
        if cap or floor:
            yield (
                f"stage.importance=none has no bounds, but stage.importance_cap={cap:g} and "
                f"stage.importance_floor={floor:g}; name what they bound, as in "
                "stage.importance=token_truncate, or drop them"
            )
    elif cap < 1:
        yield (
            f"stage.importance_cap={cap:g} would weigh down what is drawn as it should be; give 1 or more, "
            "or stage.importance=none"
        )
    elif floor > 1:
        yield f"stage.importance_floor={floor:g} would weigh up what is drawn as it should be; give 1 or less"
