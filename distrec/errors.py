"""The errors of distrec: each says the rule, what was received and the fix.

The exit codes are for schedulers: a job that ends with 2 to 5 will fail again if it is only run
again, one that ends with 6 may succeed, and one that ends with 7 goes on when it is run again.
"""

from __future__ import annotations


class DistrecError(Exception):
    """Base of every error that a user can cause or mend."""

    exit_code = 1
    may_pass = False
    """Whether the same job, started again from its last checkpoint, may succeed."""


class ConfigError(DistrecError):
    """The configuration cannot be used: unknown key, wrong type, impossible combination."""

    exit_code = 2


class DataError(DistrecError):
    """Data breaks its contract: missing file or column, bad row, id out of range."""

    exit_code = 3


class CheckpointError(DistrecError):
    """A checkpoint is missing, incomplete, damaged or of another model."""

    exit_code = 4


class TrainingError(DistrecError):
    """Training cannot go on: the loss is not finite, or the ranks disagree."""

    exit_code = 5


class LaunchError(DistrecError):
    """The ranks or Spark could not be started, or one of them died."""

    exit_code = 6


class RankLostError(LaunchError):
    """A rank died, was stuck or frozen, or the ranks did not find each other.

    Args:
        message: What happened.
        rank: Which it was, if that is known.
    """

    may_pass = True

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class RankFailedError(DistrecError):
    """A rank failed in a way that none of the other errors describes.

    Args:
        message: What happened.
        rank: Which it was.
    """

    may_pass = True

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


class StoreError(DistrecError):
    """The store of published outputs cannot be reached."""

    exit_code = 6
    may_pass = True


class StoppedError(DistrecError):
    """The job was told to stop, and goes on from its checkpoint when it is run again."""

    exit_code = 7
