"""Stage `report`: records in, one page out."""

from .render import html, report
from .summary import summarise

__all__ = ["html", "report", "summarise"]
