"""Errors that a user can mend."""


class UserError(ValueError):
    """A user's mistake: one sentence that names the value, the place and the mend.

    The `zoo` command prints the sentence and exits with code 2; `--debug` shows the traceback.
    """


class MissingExtra(UserError):
    """An optional dependency is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(
            f"{what} needs an optional dependency: pip install 'world-model-zoo[{extra}]'"
        )
