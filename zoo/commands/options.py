"""The argument parser of the commands."""

from __future__ import annotations

import argparse
from typing import NoReturn

from datamodules.errors import UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are UserErrors: one sentence, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the whole usage."""
        raise UserError(f"{message}; `{self.prog} --help` explains")
