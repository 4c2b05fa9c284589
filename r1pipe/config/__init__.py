"""Typed configuration: `schema` names fields, `typed` and `rules` check them, `compose` reads conf/, and
`changes` compares two."""

from r1pipe.config.changes import config_hash
from r1pipe.config.typed import load, read_config, to_mapping

__all__ = ["config_hash", "load", "read_config", "to_mapping"]
