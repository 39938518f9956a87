"""Whole-step forecasts: `config.py` says what can be set, `engine.py` what happens at a step, `correction.py` what is
made up for."""

from .config import ForecastConfig as ForecastConfig
