"""Wrong arguments: one line that says so, instead of a page of usage."""

import sys
from typing import Any, NoReturn

from jsonargparse import ArgumentParser


def exit_with(parser: ArgumentParser, message: str, error: Exception | None) -> NoReturn:
    """Say what is wrong and where the options are explained; exit with status 2."""
    failed: Any = getattr(error, "subcommand_parser", None) or parser
    command = failed.prog.replace(" [options]", "")
    sys.stderr.write(f"{command}: {message}\n{command} --help explains the options\n")
    sys.exit(2)


class CommandParser(ArgumentParser):
    """Parser of a command that is one function."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """See `exit_with`."""
        exit_with(self, message, ex)
