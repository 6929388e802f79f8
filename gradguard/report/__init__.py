"""What was found, for people and machines: the report object, tables, plots, the HTML page."""

from gradguard.report.leakage_report import AttackScore, LabelScore, LeakageReport, Verdict

__all__ = ["AttackScore", "LabelScore", "LeakageReport", "Verdict"]
