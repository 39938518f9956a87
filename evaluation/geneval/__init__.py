"""GenEval: prompt metadata, scoring rules, and a transformers port of the detector stage."""

from .metadata import (
    COLORS,
    RELATIONS,
    TASKS,
    Metadata,
    ObjectSpec,
    parse_line,
    read_metadata,
    write_metadata,
)
from .scorer import Aggregate, Detection, Rules, Verdict, aggregate, relations, score

__all__ = [
    "COLORS",
    "RELATIONS",
    "TASKS",
    "Aggregate",
    "Detection",
    "Metadata",
    "ObjectSpec",
    "Rules",
    "Verdict",
    "aggregate",
    "parse_line",
    "read_metadata",
    "relations",
    "score",
    "write_metadata",
]
