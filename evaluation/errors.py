"""Errors of the evaluation harness. A user can cause all of them, so all are `ValueError` too.

AccelError
├── WeightsError           (accel.errors) weights missing, unreadable or not the expected file
└── EvaluationError        something asked of the harness cannot be done honestly
    ├── MetadataError      a prompt file line that is not GenEval's (file, line, reason)
    ├── RecordError        a run folder that does not fit what is asked of it
    ├── PictureError       a picture file that cannot be read, or whose colours are not known
    ├── IncomparableError  samples or features that must not be put into one number
    └── SanityError        the detector does not see what is certainly there
"""

from __future__ import annotations

from accel.errors import AccelError, AccelWarning, WeightsError

__all__ = [
    "AccelWarning",
    "EvaluationError",
    "IncomparableError",
    "MetadataError",
    "PictureError",
    "RecordError",
    "SanityError",
    "WeightsError",
]


class EvaluationError(AccelError, ValueError):
    """Something asked of the harness cannot be done honestly."""


class MetadataError(EvaluationError):
    """A metadata line that is not in GenEval's format."""


class RecordError(EvaluationError):
    """A run folder does not fit the request: other settings, missing stage, unreadable file."""


class PictureError(EvaluationError):
    """A picture cannot be read or decoded, or its pixels have no known colours."""


class IncomparableError(EvaluationError):
    """Two things that must not enter one number: extractors, sizes, configurations."""


class SanityError(EvaluationError):
    """The detector found nothing on images that certainly show something."""
