"""The parser of the scripts that take options of their own."""

import argparse
from typing import NoReturn

from r1pipe.core.errors import ConfigError


class Arguments(argparse.ArgumentParser):
    """A parser that raises ConfigError for a wrong word, where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)
