"""Every error that a user can cause: one line that names the thing and the remedy, exit code 2."""


class R1pipeError(Exception):
    """Base of all errors shown to a user as one line, without a traceback."""


class ConfigError(R1pipeError, ValueError):
    """A key, value, type or combination in the config that cannot be."""


class DataError(R1pipeError, ValueError):
    """A data file that is missing, malformed or lacks a column; names file and line."""


class CheckpointError(R1pipeError, ValueError):
    """A checkpoint that is missing, incomplete or does not fit; names file and tensor."""


class EnvironmentProblem(R1pipeError, RuntimeError):
    """Something of the machine is missing: compiler, package, disk space, server."""
