"""Errors of the evaluation harness. All derive from `AccelError`; those a user causes are also `ValueError`.

AccelError
└── EvaluationError (ValueError)
    ├── MetadataError      a prompt file line that is not GenEval's (file, line, reason)
    ├── RecordError        a run folder that does not fit what is asked of it
    ├── WeightsError       weights missing or not the expected file
    ├── IncomparableError  samples or statistics that must not be put into one number
    └── SanityError        the detector does not see what is certainly there
"""

from __future__ import annotations

try:
    from accel.errors import AccelError
except ImportError:  # pragma: no cover

    class AccelError(Exception):  # type: ignore[no-redef]
        pass


class EvaluationError(AccelError, ValueError):
    """Something asked of the harness cannot be done honestly."""


class MetadataError(EvaluationError):
    """A metadata line that is not in GenEval's format."""


class RecordError(EvaluationError):
    """A run folder does not fit the request: other settings, missing stage, unreadable file."""


class WeightsError(EvaluationError):
    """A weight file is missing or is not the file it should be."""


class IncomparableError(EvaluationError):
    """Two things that must not enter one number: extractors, sizes, configurations."""


class SanityError(EvaluationError):
    """The detector found nothing on images that certainly show something."""
