"""How DeepSpeed runs a job, and what must be true of it."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from r1pipe.config.fields import Count, Positive, Rules, Strict
from r1pipe.config.model import ModelConfig
from r1pipe.config.parts import layers_of, rank_of

Port = Annotated[int, Field(ge=1, le=65535)]


@dataclass
class FP8Config(Strict):
    """How precision=fp8 quantises (V3 section 3.3)."""

    power_of_two: bool  # scales are powers of two (UE8M0): what is quantised twice is rounded once


@dataclass
class SlurmConfig(Strict):
    """What is asked of Slurm (sbatch)."""

    nodes: Positive  # machines; each runs engine.ranks processes
    partition: str | None  # null: Slurm's default
    account: str | None  # null: the user's default
    time: str | None  # limit, as D-HH:MM:SS; the job saves before it, and goes on in a new one. null: Slurm's
    lines: list[str]  # further options of sbatch, such as "--gpus-per-node=8"


@dataclass
class EngineConfig(Strict):
    """How DeepSpeed runs a job."""

    name: str  # the file in conf/engine/
    ranks: Positive  # processes on this machine, or on each of the hostfile
    threads: Count  # CPU threads per rank; 0: cores divided by ranks
    accelerator: Literal["cpu", "cuda", "auto"]  # auto: a GPU where there is one
    zero_level: Literal[0, 1, 2, 3]  # ranks share: nothing, optimizer state, gradients too, weights too
    expert_parallel: Positive  # ranks that share out a layer's routed experts; 1: each rank has all of them
    pipeline: Positive  # ranks that share out the model's layers; 1: each rank has all of them
    schedule: Literal["1f1b", "zbv", "dualpipev"]  # of passes in the pipeline; the last two fold it into a V
    precision: Literal["fp32", "bf16", "fp8"]  # fp8: projections in E4M3, the rest in bf16 (V3 section 3.3)
    kernels: Literal["auto", "triton", "scaled_mm", "deepgemm", "reference"]  # what multiplies in FP8
    fp8: FP8Config
    head: Literal["model", "fp32"]  # type of logits in training and sampling; model: that of the weights
    moments: Literal["fp32", "bf16"]  # AdamW's (V3 section 3.3.3: bf16); masters stay in float32
    gradient_accumulation: Positive  # micro-batches per optimizer step and rank
    recompute: bool  # run each layer again in the backward pass instead of keeping what it computed
    offload: bool  # with recompute: each half of a layer, whose input waits in the host's memory
    attention: Literal["sdpa", "flex"]  # flex: FlexAttention in the passes that train (GPU)
    compile: bool  # torch.compile the decoder layers for the passes that train (GPU)
    graphs: bool  # decode through CUDA graphs when sampling (GPU)
    sampler: Literal["bundled", "transformers", "vllm"]  # what draws; transformers: slowly; vllm: a server
    sampler_precision: Literal["same", "bf16", "fp8"]  # of the bundled sampler; other than same: of a copy
    equal: bool  # in reinforcement, sampler and trainer compute the same bits, slower (CPU kernels)
    async_steps: Count  # reinforcement: steps before its own at which a rollout batch is drawn; 0: none
    async_save: bool  # write checkpoints from a copy in memory, while training goes on
    hostfile: str | None  # DeepSpeed hostfile for several machines; null: this machine
    launcher: Literal["local", "pdsh", "openmpi", "slurm"]  # pdsh and openmpi need a hostfile
    interpreter: str | None  # Python on the machines, {host} in it is their name; null: as on this one
    slurm: SlurmConfig | None  # of launcher=slurm; null: another one
    master_addr: str | None  # host where ranks of several machines meet; null: the first
    master_port: Port | None  # port where ranks meet; null: one that is likely free
    ssh_port: Port | None  # of pdsh; null: 22
    launcher_args: str  # further arguments of pdsh, mpirun or srun
    grace_s: Annotated[float, Field(gt=0)]  # seconds from a signal to the end, checkpoint included
    stuck_after_s: Annotated[float, Field(ge=2)]  # seconds with a core and without work until a rank is stuck
    collective_limit_s: Annotated[float, Field(gt=0)]  # seconds that a collective of training may take
    control_limit_s: Annotated[float, Field(gt=0)]  # seconds that ranks wait for one that samples or saves

    @property
    def has_agents(self) -> bool:
        """Whether an agent of ours starts the ranks on each machine (r1pipe.launch.agent)."""
        return self.launcher in ("pdsh", "slurm")


def engine_rules(engine: EngineConfig) -> Rules:
    if engine.precision != "fp32" and engine.zero_level == 0:
        yield f"{engine.precision=!s} needs engine.zero_level=1 or more, which keeps float32 masters"
    yield from accelerator_rules(engine, engine.accelerator)
    if engine.graphs and engine.sampler != "bundled":
        yield f"engine.graphs=true needs engine.sampler=bundled: {engine.sampler} decodes by itself"
    if engine.offload and not engine.recompute:
        yield "engine.offload=true needs engine.recompute=true: it moves the inputs of what is computed again"
    if engine.compile and engine.recompute:
        yield "engine.compile=true needs engine.recompute=false: the compiler chooses itself what to keep"
    if engine.compile and engine.zero_level > 2:
        yield "engine.compile=true needs engine.zero_level=2 or less: ZeRO-3 fetches weights within a layer"
    if engine.compile and engine.precision != "bf16":
        yield (
            "engine.compile=true needs engine.precision=bf16: the compiler knows grouped matmuls in no other"
        )


def hosts_rules(engine: EngineConfig) -> Rules:
    """What starts ranks on several machines."""
    launcher = engine.launcher
    if launcher in ("pdsh", "openmpi") and engine.hostfile is None:
        yield f"engine.launcher={launcher} needs engine.hostfile=FILE"
    if launcher == "local" and engine.hostfile is not None:
        yield (
            "engine.launcher=local runs on this machine alone; drop "
            f"{engine.hostfile=!s} or choose pdsh or openmpi"
        )
    if launcher == "slurm" and engine.hostfile is not None:
        yield f"engine.launcher=slurm runs on the machines that Slurm gives; drop {engine.hostfile=!s}"
    if (launcher == "slurm") != (engine.slurm is not None):
        yield "engine.launcher=slurm and engine.slurm go together: choose engine=slurm, or neither"
    keys = ("master_addr", "ssh_port", "launcher_args", "interpreter")
    for key, value in ((key, getattr(engine, key)) for key in keys):
        if value and launcher == "local":
            yield f"engine.{key}={value} is for several machines; drop it, or give engine.hostfile=FILE"
    if engine.ssh_port is not None and launcher != "pdsh":
        yield (
            f"{engine.ssh_port=!s} is for engine.launcher=pdsh; srun uses no ssh, and mpirun takes the port "
            "from engine.launcher_args"
        )
    if engine.interpreter is not None and launcher == "openmpi":
        yield f"{engine.interpreter=!s} is for engine.launcher=pdsh or slurm; mpirun takes the one of here"


def sampler_precision_rules(engine: EngineConfig) -> Rules:
    """What is said of the bundled sampler, whose kernels are the trainer's."""
    wishes = {"equal": engine.equal, "sampler_precision": engine.sampler_precision != "same"}
    for key, wished in wishes.items():
        if wished and engine.sampler != "bundled":
            yield f"engine.{key} is for engine.sampler=bundled, not {engine.sampler}"
    if engine.equal and engine.async_steps:
        yield "engine.equal=true needs engine.async_steps=0: later steps have other weights"
    if engine.equal and engine.precision == "fp8":
        yield "engine.equal=true needs engine.precision=fp32 or bf16: FP8 products are emulated on a CPU"
    if engine.equal and engine.sampler_precision != "same":
        yield f"engine.equal=true needs engine.sampler_precision=same, not {engine.sampler_precision}"


def equal_rules(engine: EngineConfig, model: ModelConfig) -> Rules:
    """The kernels multiply pairs of bfloat16 numbers."""
    if not engine.equal or engine.precision != "bf16":
        return
    widths = {
        "hidden_size": model.hidden_size,
        "vocab_size": model.vocab_size,
        "intermediate_size": model.intermediate_size,
        "moe_intermediate_size": model.moe_intermediate_size,
        "q_lora_rank": model.q_lora_rank or 0,
        "kv_lora_rank": model.kv_lora_rank,
        "qk_nope_head_dim": model.qk_nope_head_dim,
        "v_head_dim": model.v_head_dim,
    }
    for name, width in widths.items():
        if width % 2:
            yield f"engine.equal=true in bfloat16 takes even widths alone, not model.{name}={width}"


def expert_rules(engine: EngineConfig, model: ModelConfig) -> Rules:
    """Experts spread over ranks; ranks on several machines are counted by the job."""
    size = engine.expert_parallel
    if size == 1:
        return
    if model.first_k_dense_replace >= model.num_hidden_layers:
        yield f"{engine.expert_parallel=}: model={model.name} has no experts; drop it"
    if model.n_routed_experts % size:
        yield f"{engine.expert_parallel=} must divide {model.n_routed_experts=}"
    here = engine.hostfile is None and engine.slurm is None
    if here and engine.ranks % size:
        yield f"{engine.expert_parallel=} must divide {engine.ranks=}"
    elif here and engine.ranks % (size * engine.pipeline):
        yield f"{engine.expert_parallel=} times {engine.pipeline=} must divide {engine.ranks=}"
    if engine.zero_level == 0:
        yield f"{engine.expert_parallel=} needs engine.zero_level=1 or more"
    for key, wished in {"compile": engine.compile, "equal": engine.equal}.items():
        if wished:
            yield f"engine.{key}=true needs engine.expert_parallel=1: tokens travel within a layer"


def pipeline_rules(engine: EngineConfig, model: ModelConfig) -> Rules:
    """Layers spread over ranks; ranks on several machines are counted by the job."""
    size, folded = engine.pipeline, engine.schedule != "1f1b"
    if size == 1:
        if folded:
            yield f"engine.schedule={engine.schedule} is for a pipeline; give engine.pipeline=2 or more"
        return
    if size * (1 + folded) > model.num_hidden_layers:
        of_each = f", two parts a rank with engine.schedule={engine.schedule}," if folded else ""
        yield f"{engine.pipeline=}{of_each} is more than {model.num_hidden_layers=}"
    if engine.hostfile is None and engine.slurm is None and engine.ranks % size:
        yield f"{engine.pipeline=} must divide {engine.ranks=}"
    if model.tie_word_embeddings and not folded:
        yield (
            "model.tie_word_embeddings=true: with engine.schedule=1f1b, embedding and head are on different "
            "ranks; give engine.schedule=zbv"
        )
    if engine.zero_level > 1:
        yield f"{engine.zero_level=} with {engine.pipeline=}: a pipeline goes with ZeRO level 1 at most"
    others = {"compile": "false", "equal": "false"}
    for key, needed in others.items():
        given = str(getattr(engine, key)).lower()
        if given != needed:
            yield f"engine.{key}={given} does not go with {engine.pipeline=}; give engine.{key}={needed}"
    yield from _experts_everywhere(engine, model)
    if engine.recompute and folded:  # they go backward twice through a layer
        yield f"engine.recompute=true does not go with engine.schedule={engine.schedule}; give 1f1b"


def _experts_everywhere(engine: EngineConfig, model: ModelConfig) -> Rules:
    """DeepSpeed sums the norms of experts over all ranks of a pipeline, or of none."""
    places = rank_of(engine.schedule, engine.pipeline)
    parts = layers_of(model.num_hidden_layers, len(places))
    ends = {rank: own.stop for rank, own in zip(places, parts, strict=True)}  # of each rank's last part
    if engine.expert_parallel > 1 and min(ends.values()) <= model.first_k_dense_replace:
        yield (
            f"{engine.pipeline=}: a rank would have dense layers alone, and {engine.expert_parallel=} needs "
            "experts on each; give fewer ranks of a pipeline"
        )


def fp8_rules(engine: EngineConfig, model: ModelConfig) -> Rules:
    """FP8 products come in pieces of 16 numbers, as those of the tensor cores do."""
    key = "precision" if engine.precision == "fp8" else "sampler_precision"
    if "fp8" not in (engine.precision, engine.sampler_precision):
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
        if width % 16:
            yield (
                f"{name} = {width} is no multiple of 16, as engine.{key}=fp8 needs; change it, or take bf16"
            )
    if engine.graphs:
        yield f"engine.graphs=true needs engine.{key}=bf16: FP8 decodes without CUDA graphs"


def accelerator_rules(engine: EngineConfig, device: str) -> Rules:
    """What `device` must be able to do: "cpu", "cuda" or, not known yet, "auto"."""
    wishes = {
        "attention=flex": engine.attention == "flex",  # torch has no backward pass of it for CPUs
        "compile=true": engine.compile,
        "graphs=true": engine.graphs,
    }
    for wish, wished in wishes.items():
        if wished and device == "cpu":
            yield f"engine.{wish} needs a GPU (engine.accelerator=cuda)"
    if engine.equal and device == "cuda":
        yield "engine.equal=true needs engine.accelerator=cpu: a GPU sums by the batch's shape"
