"""Typed configuration: `schema` names fields, `typed` and `rules` check them, `compose` reads conf/."""

from r1pipe.config.typed import config_hash, load, read_config, to_mapping

__all__ = ["config_hash", "load", "read_config", "to_mapping"]
