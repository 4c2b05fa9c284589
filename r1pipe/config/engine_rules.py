"""What must be true of the engine's keys; asked at composition, and of the real device again in the job."""

from r1pipe.config.architecture import Rules
from r1pipe.config.parts import EngineConfig, ModelConfig


def engine_rules(engine: EngineConfig) -> Rules:
    yield (
        engine.launcher == "local" or engine.hostfile is not None,
        f"engine.launcher={engine.launcher} needs engine.hostfile=FILE",
    )
    yield (
        engine.launcher != "local" or engine.hostfile is None,
        f"engine.launcher=local runs on this machine alone; drop engine.hostfile={engine.hostfile} or choose "
        "pdsh, openmpi or slurm",
    )
    yield (
        engine.precision == "fp32" or engine.zero_level >= 1,
        f"engine.precision={engine.precision} needs engine.zero_level=1 or more, which keeps float32 masters",
    )
    yield (
        engine.grace_s > 0,
        f"engine.grace_s={engine.grace_s:g} must be above 0: within it a job saves and leaves",
    )
    yield (
        engine.stuck_after_s >= 2,
        f"engine.stuck_after_s={engine.stuck_after_s:g} must be at least 2: heartbeats come once a second",
    )
    yield from accelerator_rules(engine, engine.accelerator)
    yield (
        not (engine.compile and engine.recompute),
        "engine.compile=true needs engine.recompute=false: the compiler chooses itself what to keep",
    )
    yield (
        not engine.compile or engine.zero_level <= 2,
        "engine.compile=true needs engine.zero_level=2 or less: ZeRO-3 fetches weights within a layer",
    )
    yield (
        not engine.compile or engine.precision == "bf16",
        "engine.compile=true needs engine.precision=bf16: the compiler knows grouped matmuls in no other",
    )


def fp8_rules(engine: EngineConfig, model: ModelConfig) -> Rules:
    """FP8 products come in pieces of 16 numbers, as those of the tensor cores do."""
    if engine.precision != "fp8":
        return
    heads = model.num_attention_heads
    widths = {
        "model.hidden_size": model.hidden_size,
        "model.intermediate_size": model.intermediate_size,
        "model.moe_intermediate_size": model.moe_intermediate_size,
        "model.q_lora_rank": model.q_lora_rank or 0,
        "model.kv_lora_rank": model.kv_lora_rank,
        "model.kv_lora_rank + qk_rope_head_dim": model.kv_lora_rank + model.qk_rope_head_dim,
        "model.num_attention_heads x (qk_nope_head_dim + qk_rope_head_dim)": heads
        * (model.qk_nope_head_dim + model.qk_rope_head_dim),
        "model.num_attention_heads x (qk_nope_head_dim + v_head_dim)": heads
        * (model.qk_nope_head_dim + model.v_head_dim),
        "model.num_attention_heads x v_head_dim": heads * model.v_head_dim,
    }
    for name, width in widths.items():
        yield (
            width % 16 == 0,
            f"{name} = {width} is no multiple of 16, as engine.precision=fp8 needs; change it, or take bf16",
        )
    yield not engine.graphs, "engine.graphs=true needs engine.precision=bf16: FP8 decodes without CUDA graphs"


def accelerator_rules(engine: EngineConfig, device: str) -> Rules:
    """What `device` must be able to do: "cpu", "cuda" or, not known yet, "auto"."""
    wishes = {
        "attention=flex": engine.attention == "flex",  # torch has no backward pass of it for CPUs
        "compile=true": engine.compile,
        "graphs=true": engine.graphs,
    }
    for wish, wished in wishes.items():
        yield not wished or device != "cpu", f"engine.{wish} needs a GPU (engine.accelerator=cuda)"
