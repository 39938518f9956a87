"""Speculative decoding for autoregressive image models: windows of drafted tokens, verified in one forward.

`engine.py` puts a decoder into a pipeline, `step.py` says why it is exact, `config.py` what can be set, `verify.py` what relaxing costs. Everything stands on
the contract in `accel.core.decoding` and knows no model.
"""

from .config import SpeculativeDecodingConfig as SpeculativeDecodingConfig
