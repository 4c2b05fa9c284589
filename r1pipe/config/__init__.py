"""Typed configuration: fields with their bounds and rules (`model`, `engine`, `data`, `stages`, `rl`, `run`).

`rules` holds what spans several of them. `compose` reads conf/ (only for the command line), `groups` knows
its files, and `changes` compares two configs.
"""

from r1pipe.config.answerer import AnswererConfig
from r1pipe.config.benchmark import BenchmarkConfig
from r1pipe.config.changes import config_hash
from r1pipe.config.data import DataConfig, SourceConfig
from r1pipe.config.distill import DistillConfig
from r1pipe.config.engine import EngineConfig
from r1pipe.config.hf import HFConfig
from r1pipe.config.lora import LoRAConfig
from r1pipe.config.model import ModelConfig, RopeScaling
from r1pipe.config.rl import (
    PluginLimits,
    PPOConfig,
    PreferenceConfig,
    RemoteLimits,
    RewardsConfig,
    RLConfig,
    WireConfig,
)
from r1pipe.config.run import (
    STAGE_TYPES,
    ChatConfig,
    ParentRef,
    RunConfig,
    TrackingConfig,
    load,
    read_config,
    to_mapping,
)
from r1pipe.config.sampler import SamplerConfig
from r1pipe.config.screening import ScreeningConfig
from r1pipe.config.stages import (
    CodeConfig,
    EvalConfig,
    EvaluateConfig,
    FilterConfig,
    FineTuneConfig,
    OptimConfig,
    PretrainConfig,
    RejectionConfig,
    RewardModelConfig,
    RouterConfig,
    SFTConfig,
    StageConfig,
)
from r1pipe.config.transfer import DivergenceConfig, RankingConfig, TaughtConfig
