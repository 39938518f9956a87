"""Token pruning: `config.py` says what can be set, `engine.py` what happens at a step, `selection.py` which tokens are computed."""

from .config import Selection as Selection
from .config import TokenPruningConfig as TokenPruningConfig
