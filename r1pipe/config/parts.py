"""The types of what lies outside a stage or is the same in several: model, engine, tracking, data, optimizer,
sampling, evaluation. Others import them from `r1pipe.config.schema`, where the rest is.
"""

from dataclasses import dataclass


@dataclass
class RopeScaling:
    """YaRN, under transformers' names (V3 section 4.3); absent when positions are not scaled."""

    type: str  # "yarn"
    factor: float  # how many times longer than the original context
    original_max_position_embeddings: int  # the context of pre-training
    beta_fast: float  # rotations above which a dimension is left as it is
    beta_slow: float  # rotations below which a dimension is interpolated
    mscale: float  # attention temperature of the cos/sin tables
    mscale_all_dim: float  # attention temperature of the softmax scale


@dataclass
class ModelConfig:
    """DeepSeek-V3's architecture under the published config.json names (V3 section 2.1)."""

    name: str  # the file in conf/model/
    vocab_size: int  # rows of the embedding; at least the tokenizer's size
    hidden_size: int  # width of the residual stream
    intermediate_size: int  # width of the dense layers' SwiGLU
    moe_intermediate_size: int  # width of one routed expert
    num_hidden_layers: int  # decoder layers, dense and MoE
    num_attention_heads: int  # MLA heads
    n_shared_experts: int  # experts that every token visits
    n_routed_experts: int  # experts that the gate chooses among
    num_experts_per_tok: int  # routed experts a token visits (top-k)
    n_group: int  # groups (nodes) of experts
    topk_group: int  # groups a token may visit
    first_k_dense_replace: int  # first layers that have a dense MLP instead of experts
    norm_topk_prob: bool  # whether the chosen experts' weights are normalised to sum 1
    scoring_func: str  # "sigmoid" (V3) or "softmax" (V2)
    topk_method: str  # "noaux_tc" (V3), "group_limited_greedy" or "greedy" (V2)
    routed_scaling_factor: float  # factor on the routed experts' weights
    q_lora_rank: int | None  # rank of the query compression; null: one full projection
    kv_lora_rank: int  # width of the latent that the cache holds
    qk_nope_head_dim: int  # width per head without position
    qk_rope_head_dim: int  # width of the decoupled rotary part, shared by all heads in the key
    v_head_dim: int  # width per head of the values
    max_position_embeddings: int  # longest sequence
    rope_theta: float  # base of the rotary frequencies
    rope_scaling: RopeScaling | None  # YaRN, or null
    rms_norm_eps: float  # epsilon of the layers' norms (the latent norms always use 1e-6)
    initializer_range: float  # standard deviation of the initial weights
    tie_word_embeddings: bool  # whether the head shares the embedding
    num_nextn_predict_layers: (
        int  # multi-token prediction layers, each for one token further (V3 section 2.2)
    )


@dataclass
class FP8Config:
    """How precision=fp8 quantises (V3 section 3.3)."""

    power_of_two: bool  # scales are powers of two (UE8M0): what is quantised twice is rounded once
    gradients: str  # what shares a scale: "tile" (1 x 128, V3), or to compare with "block", "tensor", "none"


@dataclass
class EngineConfig:
    """How DeepSpeed runs a job."""

    name: str  # the file in conf/engine/
    ranks: int  # processes on this machine
    threads: int  # CPU threads per rank; 0: cores divided by ranks
    accelerator: str  # "cpu", "cuda" or "auto"
    zero_level: int  # ZeRO 0 to 3
    precision: str  # "fp32", "bf16", or "fp8": projections in E4M3, the rest in bf16 (V3 section 3.3)
    kernels: str  # of fp8: "auto", "triton", "scaled_mm", "deepgemm" or "reference" (plain torch)
    fp8: FP8Config
    moments: str  # AdamW's, "fp32" or (V3 section 3.3.3) "bf16"; masters and gradients are float32 always
    gradient_accumulation: int  # micro-batches per optimizer step and rank
    recompute: bool  # run each layer again in the backward pass instead of keeping what it computed
    attention: str  # "sdpa", or "flex" (GPU): FlexAttention in the passes that train
    compile: bool  # torch.compile the decoder layers for the passes that train (GPU)
    graphs: bool  # decode through CUDA graphs when sampling (GPU)
    hostfile: str | None  # DeepSpeed hostfile for several machines; null: this machine
    launcher: str  # "local", "pdsh", "openmpi" or "slurm" (with a hostfile)
    grace_s: float  # seconds from a signal to the end at the latest; a step and a checkpoint take place in it
    stuck_after_s: float  # seconds without a sign of work after which a rank counts as stuck


@dataclass
class WireConfig:
    """When a tripwire trips, and what then (r1pipe/train/rl/tripwires.py says what it measures)."""

    limit: float  # the number that must not be passed
    steps: int  # steps in a row beyond it
    action: str  # "off", "warn", "pause" (with a checkpoint) or "stop"


@dataclass
class TripwiresConfig:
    """What watches over a run of reinforcement."""

    name: str  # the file in conf/tripwires/
    wires: dict[str, WireConfig]


@dataclass
class TrackingConfig:
    """Where MLflow keeps runs; metrics.jsonl in the run folder is always written."""

    enabled: bool  # false: no MLflow at all
    uri: str | None  # tracking server or database; null: sqlite under the root folder
    experiment: str  # MLflow experiment's name
    model_name: str  # registered model whose versions are the checkpoints


@dataclass
class SourceConfig:
    """One file of rows, read through `datasets`."""

    path: str  # json, jsonl, csv or parquet; .gz too; a relative path is looked up in `data.path`
    columns: dict[str, str]  # role -> column: question, answer, solution, response, safe, chosen, rejected
    answer_after: str | None  # mark after which the gold answer stands in the answer column, e.g. "####"
    language: str  # "en", "zh" or "auto" (by the share of Chinese characters)
    task: str  # the task name its rows are counted under
    split: str | None  # "train", "dev" or "test" for all its rows; null: by a hash of the question


@dataclass
class DataConfig:
    """What a stage learns from: the bundled world, files, or reasoning-gym."""

    name: str  # the file in conf/data/
    kind: str  # "world", "files" or "reasoning_gym"
    path: str | None  # files: the folder of the sources, or one file in place of the first source
    tasks: list[str]  # world: reasoning tasks; reasoning_gym: task names
    languages: list[str]  # world: languages
    levels: list[int]  # world: difficulty levels that prompts are drawn from
    reasoning: list[SourceConfig]  # files: problems with gold answers and, maybe, worked solutions
    general: list[SourceConfig]  # files: instructions with answers
    preferences: list[SourceConfig]  # files: chosen and rejected answers
    bad_rows: str  # files, of a row that cannot be used: "refuse" it and stop, or "set_aside" with the reason
    max_bad_rows: float  # share of a file's rows that may be set aside; above it the file is refused
    longest_row: int  # bytes of a row; a longer one cannot be used
    labels: list[SourceConfig]  # files: responses labelled safe or not, or pairs to be read as such
    substitutions: dict[str, str]  # files: texts to put in place of {{key}} in rows (identity data)


@dataclass
class OptimConfig:
    """AdamW and its schedule (R1 supplement; V3 section 4.2)."""

    lr: float  # peak learning rate
    min_lr: float  # learning rate at the last step
    schedule: str  # "constant", "linear" or "cosine", after the warm-up
    warmup_steps: int  # steps of linear warm-up
    betas: list[float]  # AdamW's betas
    eps: float  # AdamW's epsilon
    weight_decay: float  # on matrices only
    grad_clip: float  # global gradient norm is clipped to this
    max_skipped: int  # steps in a row skipped because loss or gradient is not finite; one more ends the job


@dataclass
class RouterConfig:
    """Load balancing of the experts (V3 section 2.1.2)."""

    bias_rate: float  # step of the bias update, once per optimizer step; 0 freezes the bias
    balance_alpha: float  # weight of the sequence-wise balance loss (V3 eq. 17); 0: none


@dataclass
class SamplingConfig:
    """How completions are drawn."""

    temperature: float  # 0 is greedy
    top_p: float  # nucleus; 1 keeps everything
    max_tokens: int  # longest completion
    max_num_seqs: int  # sequences decoded together on one rank


@dataclass
class EvalConfig:
    """Held-out evaluation, at the end of a stage and every so often in between."""

    split: str  # "test", or "dev" while tuning
    problems: int  # held-out reasoning problems at the end
    samples: int  # k completions per problem (pass@1 is their mean, cons@k their vote)
    general: int  # held-out general prompts at the end (split evenly over the kinds)
    temperature: float  # R1: 0.6
    top_p: float  # R1: 0.95
    greedy: bool  # also score one greedy completion per problem
    max_tokens: int  # longest completion
    max_num_seqs: int  # sequences decoded together on one rank
    every: int  # steps between short evaluations while training; 0: none
    every_problems: int  # dev problems of such a short evaluation, one sample each
    shown: int  # fixed prompts whose completions are kept for the report
