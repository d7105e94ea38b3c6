"""The errors of distrec: each says the rule, what was received and the fix.

The exit codes are for schedulers: a job that ends with 2 to 5 will fail again if it is only run
again, one that ends with 6 may succeed.
"""

from __future__ import annotations


class DistrecError(Exception):
    """Base of every error that a user can cause or mend."""

    exit_code = 1


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
