"""Stage `report`: records in, one page out."""

from accel.evaluation.report.render import html, report
from accel.evaluation.report.summary import summarise

__all__ = ["html", "report", "summarise"]
