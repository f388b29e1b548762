"""The errors this package raises.

Every message says what is wrong, where, what was expected, what was found and what to do.
"""


class H2mvError(Exception):
    """Base of every error raised on purpose by this package."""


class ConfigError(H2mvError):
    """A setting is unknown, missing or contradicts another one."""


class DataError(H2mvError):
    """Input data do not have the promised variables, units, axes or values."""


class StoreError(H2mvError):
    """A store cannot be reached, read or written, or holds something else.

    Attributes:
        full: there is no room for what was to be written; it may help to wait until somebody frees space.
    """

    def __init__(self, message: str, *, full: bool = False) -> None:
        super().__init__(message)
        self.full = full


class JobError(H2mvError):
    """A job cannot be started, or one of its units failed."""


class NothingNewError(JobError):
    """There is nothing to append to a cube, because its forcing has not grown: try again later."""


class CheckpointError(H2mvError):
    """A checkpoint is truncated, foreign or belongs to another model."""


def describe(what: str, *, where: str, expected: str, actual: str, fix: str) -> str:
    """Put the five parts of a helpful message into one text.

    >>> print(describe("wrong units", where="tair", expected="K", actual="degC", fix="convert"))
    wrong units
      where:    tair
      expected: K
      actual:   degC
      to do:    convert
    """
    return f"{what}\n  where:    {where}\n  expected: {expected}\n  actual:   {actual}\n  to do:    {fix}"
