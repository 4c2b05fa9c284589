"""Configs and records that several tests need."""

from omegaconf import OmegaConf

from r1pipe.config import DataConfig
from r1pipe.core.paths import conf_dir


def world_config() -> DataConfig:
    """conf/data/world.yaml as the jobs see it."""
    return DataConfig(
        **OmegaConf.to_container(OmegaConf.load(conf_dir() / "data" / "world.yaml"), resolve=True)
    )
