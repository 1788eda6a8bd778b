"""The exceptions for failures a user can act on, as a tree, with their exit codes.

CompressionError            1
├── ConfigError             2   the recipe or command line requests something impossible
│   └── PlanError           2   the recipe is well formed, but no plan can meet it
├── ModelError              3   the input model is missing, broken or not supported
├── DataError               3   the calibration or evaluation text is missing, broken or too short
├── ClusterError            4   no cluster, or none that is large enough
├── NumericsError           5   a computation gave no usable number
└── StorageError            6   a file cannot be read or written, or is damaged
"""


class CompressionError(Exception):
    """A failure that a user can act on: what is wrong, and how to fix it.

    Attributes:
        hint: how to fix it; empty where the message is enough.
        exit_code: of the command line for this class.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(CompressionError):
    """The recipe or the command line requests something impossible."""

    exit_code = 2


class PlanError(ConfigError):
    """The recipe is well formed, but no plan can meet it."""


class ModelError(CompressionError):
    """The input model is missing, broken or not supported."""

    exit_code = 3


class DataError(CompressionError):
    """The calibration or evaluation text is missing, broken or too short."""

    exit_code = 3


class ClusterError(CompressionError):
    """There is no cluster, or none that is large enough."""

    exit_code = 4


class NumericsError(CompressionError):
    """A computation gave no usable number."""

    exit_code = 5


class StorageError(CompressionError):
    """A file cannot be read or written, or is damaged."""

    exit_code = 6
