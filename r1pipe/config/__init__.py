"""Typed configuration: `schema` names the fields, `typed` checks them, `rules` what spans them, `compose` builds them."""

from r1pipe.config.typed import config_hash, load, read_config, to_mapping

__all__ = ["config_hash", "load", "read_config", "to_mapping"]
