"""Cached token merging: `config.py` says what can be set, `engine.py` what happens at a step, `matching.py` which tokens belong together."""

from .config import Matching as Matching
from .config import TokenMergingConfig as TokenMergingConfig
