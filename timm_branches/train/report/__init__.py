"""`report.html`: what a run gave, as one file that opens offline."""

from timm_branches.train.report.answers import Answers, examine
from timm_branches.train.report.page import report_page, write_report

__all__ = ["Answers", "examine", "report_page", "write_report"]
