"""What can go wrong, as a tree.

    OrchestratorError            a rule, the value that broke it, and the next step
    ├── UserError                the user's input is wrong: exit status 2
    │   ├── RecipeError          (ValueError)        the recipe file or a --set
    │   ├── DataError            (ValueError)        the data the recipe points at
    │   ├── BackboneError        (FileNotFoundError) the pretrained model is not to be had
    │   ├── ModelNotFound        (LookupError)       a name, version or alias that the registry does not hold
    │   ├── ResourceError        (RuntimeError)      more than the machine or cluster has
    │   └── PortInUse            (OSError)           something else listens there
    └── StageError               the run failed: exit status 1
        ├── IntegrityError       (ValueError)        bytes on disk are not the bytes that were written
        ├── DiskFull             (OSError)           no room left; what was written before is intact
        ├── TrainingFailed       (RuntimeError)      the training loop raised on some worker
        ├── TuningFailed         (RuntimeError)      no trial of a study can be the winner
        ├── CompressionFailed    (RuntimeError)      a model could not be made smaller, or no candidate keeps the limits
        ├── ServingFailed        (RuntimeError)      the endpoint did not come up
        └── ConflictError        (RuntimeError)      somebody else changed it in the meantime

Every error keeps its constructor's arguments in ``args``, so it crosses process borders by pickling.
"""

from __future__ import annotations


class OrchestratorError(Exception):
    """``message`` states the rule and the offending value; ``next_step`` says what to do about it."""

    exit_status = 1
    kind = ""
    """Of a run that was given up: what ``training/failure.py`` found, such as ``out_of_memory``."""

    def __init__(self, message: str, next_step: str = "") -> None:
        super().__init__(message, next_step)
        self.message = message
        self.next_step = next_step

    def __str__(self) -> str:
        return f"{self.message}: {self.next_step}" if self.next_step else self.message


class UserError(OrchestratorError):
    exit_status = 2


class RecipeError(UserError, ValueError):
    pass


class DataError(UserError, ValueError):
    pass


class BackboneError(UserError, FileNotFoundError):
    pass


class ModelNotFound(UserError, LookupError):
    pass


class ResourceError(UserError, RuntimeError):
    pass


class PortInUse(UserError, OSError):
    pass


class StageError(OrchestratorError):
    pass


class IntegrityError(StageError, ValueError):
    pass


class DiskFull(StageError, OSError):
    pass


class TrainingFailed(StageError, RuntimeError):
    pass


class TuningFailed(StageError, RuntimeError):
    pass


class CompressionFailed(StageError, RuntimeError):
    pass


class ServingFailed(StageError, RuntimeError):
    pass


class ConflictError(StageError, RuntimeError):
    pass
