"""The parser of every command but train, which has the one of its configuration."""

from argparse import ArgumentParser
from typing import Any, NoReturn

from ddpm_hf.redaction import redact


class Parser(ArgumentParser):
    """Takes no abbreviations, which a further option would break, and repeats no secret when it complains."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | options)

    def error(self, message: str) -> NoReturn:
        """Says what is wrong with the command line, and exits with 2."""
        super().error(redact(message))
